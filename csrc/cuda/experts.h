// Rows of a stack of experts on the host: how many tiles they are cut into, and where these are in the workspace.
#pragma once
#include <algorithm>

#include "cuda/primitives.h"
#include "cuda/stack.h"

namespace lowbit {
namespace cuda {
namespace experts {

constexpr int THREADS = 256;  // of a block that sorts
constexpr int64_t MOST_ROWS = int64_t(1) << 24, MOST_STACK_ROWS = int64_t(1) << 28, MOST_BLOCKS = int64_t(1) << 31;

// Rows are sorted by group: their expert, then those whose expert is elsewhere, then negative ids.
template <class Weight>
int groups(const Experts<Weight>& call) {
  return static_cast<int>(call.E) + 2;
}

// A tile has up to 2^shift rows of one group. Where there are few rows for many experts, a tile has the number of its
// first place in the sorted order, so that there are as many tiles as rows.
struct Tiling {
  int shift;
  bool by_place;
  int64_t count;
};

template <class Weight>
Tiling tiling_of(const Experts<Weight>& call, int shift) {
  const int64_t by_group = (call.S >> shift) + groups(call);
  return {shift, call.S <= by_group, std::min(call.S, by_group)};
}

// What a workspace has: the tiles, the sorted rows, and what a family adds behind them.
struct Sorted {
  Words4* tiles;
  Words2* order;
  float* more;
};

inline int64_t sorted_bytes(const Tiling& tiling, int64_t S) { return 16 * tiling.count + 8 * (S + S % 2); }

inline Sorted sorted_in(void* workspace, const Tiling& tiling, int64_t S) {
  char* const at = static_cast<char*>(workspace);
  return {reinterpret_cast<Words4*>(at), reinterpret_cast<Words2*>(at + 16 * tiling.count),
          reinterpret_cast<float*>(at + sorted_bytes(tiling, S))};
}

// What the rows of a tile get: there are none; products; 0, as the expert is elsewhere; NaN, as the id is negative.
enum What { NOTHING, PRODUCTS, ZEROS, NANS };

// Why no stack is taken.
template <class Weight>
const char* declines(const Experts<Weight>& call) {
  if (call.S >= MOST_ROWS || call.linear.M >= MOST_ROWS) return "experts take fewer than 2^24 rows";
  if (call.linear.weight.N >= MOST_STACK_ROWS) return "experts take stacks of fewer than 2^28 rows";
  return nullptr;
}

// The product of one expert with `rows` rows of x: what decides about kernels and their shapes.
template <class Weight>
Linear<Weight> of_one(const Experts<Weight>& call, int64_t rows) {
  Linear<Weight> one = call.linear;
  one.weight.N /= call.E;
  one.M = rows;
  return one;
}

// Starts the kernel that sorts.
int launch_sort(const void* ids, bool wide, int64_t S, int64_t repeats, int64_t E, const Tiling& tiling,
                const Sorted& sorted, Stream stream);

}  // namespace experts
}  // namespace cuda
}  // namespace lowbit
