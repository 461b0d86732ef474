// How the kernels of many rows for sm_90a are laid out: cuda/batch_sm90.cuh.
#pragma once
#include <algorithm>

#include "common/operands.h"
#include "cuda/codes.h"
#include "cuda/device.h"

namespace lowbit {
namespace cuda {
namespace batch_sm90 {

constexpr int ROWS = 128;  // of W, for a block: 64 for each of two warpgroups
constexpr int MOST_SPLITS = 16;
constexpr int64_t MOST_COLUMNS = int64_t(1) << 20, MOST_VALUES = int64_t(1) << 31;

template <class Weight>
const char* declines(const Linear<Weight>& call, const Device& device) {
  const Codes& w = call.weight;
  const auto aligned = [](const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; };
  if (device.architecture != 90) return "batch_sm90 is for sm_90";
  if (call.int8) return "batch_sm90 has no int8 activations";
  if (call.dtype != DType::f16 && call.dtype != DType::bf16) return "batch_sm90 takes x in float16 or bfloat16";
  if (w.K < 1 || w.K > MOST_COLUMNS) return "batch_sm90 takes 1 to 2^20 columns";
  if (w.K % 8 != 0 || !aligned(call.x)) return "batch_sm90 takes rows of x that begin at multiples of 16 bytes";
  if (w.group_size < w.K && w.group_size % CHUNK != 0) return "batch_sm90 takes groups of a multiple of 32 columns";
  if (w.N < 0 || w.N * w.G >= MOST_VALUES) return "batch_sm90 takes fewer than 2^31 groups";
  if (call.M < 0 || call.M >= MOST_VALUES / 2) return "batch_sm90 takes fewer than 2^30 rows of x";
  if (w.blocks || w.row_bytes != (w.K + TILE - 1) / TILE * 32 * w.bits) return "batch_sm90 reads codes in tiles";
  if (!aligned(w.packed)) return "batch_sm90 reads codes that begin at a multiple of 16 bytes";
  return nullptr;
}

// Into how many splits K is cut: one, unless a split more leaves a block for each processor, and four tiles for each
// block. Where a row of y may not depend on M, it is one.
template <class Weight>
int splits_of(const Linear<Weight>& call, int64_t x_rows, const Device& device) {
  if (call.batch_invariant) return 1;
  const int64_t tiles = (call.weight.K + TILE - 1) / TILE;
  const int64_t blocks = (call.weight.N + ROWS - 1) / ROWS * ((call.M + x_rows - 1) / x_rows);
  const int64_t wanted = device.processors / std::max<int64_t>(1, blocks);
  return static_cast<int>(std::max<int64_t>(1, std::min<int64_t>({wanted, tiles / 4, MOST_SPLITS})));
}

// float32 [splits, M, N]
template <class Weight>
int64_t workspace_bytes(const Linear<Weight>& call, int splits) {
  return splits > 1 ? splits * call.M * call.weight.N * 4 : 0;
}

// What group_of() of the kernel multiplies chunks with: 2^31 / (chunks of a group), rounded up; 0 for one group.
inline uint32_t group_factor(const Codes& w) {
  const int64_t chunks = w.group_size / CHUNK;
  return w.group_size >= w.K ? 0 : static_cast<uint32_t>(((int64_t(1) << 31) + chunks - 1) / chunks);
}

}  // namespace batch_sm90
}  // namespace cuda
}  // namespace lowbit
