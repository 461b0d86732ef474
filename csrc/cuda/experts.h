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

constexpr int64_t DECODE_ROWS = 8, BATCH_ROWS = 32;  // of a tile, at most

// Decode takes up to 8 rows of an expert, if all that are met have as many. The kernels add in different orders: where
// a row of y may not depend on the others, batch takes every call.
template <class Weight>
bool has_many_rows(const Experts<Weight>& call) {
  return call.linear.batch_invariant || call.S > DECODE_ROWS * std::max<int64_t>(1, std::min(call.S, call.E));
}

// The binary logarithm of how many rows a tile has where there is room for `rows`.
inline int shift_of(int64_t rows) {
  int shift = 0;
  while (int64_t(2) << shift <= rows) ++shift;
  return shift;
}

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
  // As if every row were a tile, of the kernel that has more blocks.
  if ((call.S + call.E + 2) * (call.linear.weight.N / call.E / 32 + 1) >= MOST_BLOCKS)
    return "experts take fewer than 2^31 blocks";
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
