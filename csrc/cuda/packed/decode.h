// Launches of packed/decode.cuh.
#pragma once
#include <algorithm>

#include "common/packed.h"
#include "cuda/codes.h"
#include "cuda/device.h"

namespace lowbit {
namespace cuda {
namespace packed_decode {

using Call = Linear<packed::Weight>;

constexpr int ROW_WARPS = 2, K_WARPS = 4, THREADS = 32 * ROW_WARPS * K_WARPS, ROWS = 16 * ROW_WARPS;
constexpr int SLICE = K_WARPS * TILE;  // columns that a block multiplies at a time
constexpr int64_t MOST_ROWS = 16, MOST_COLUMNS = int64_t(1) << 20, MOST_VALUES = int64_t(1) << 31, MOST_SPLITS = 16;

inline int row_blocks(int64_t N) { return static_cast<int>((N + ROWS - 1) / ROWS); }

inline bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

inline const char* declines(const Call& call) {
  const packed::Weight& w = call.weight;
  if (call.M < 0 || (call.M > MOST_ROWS && call.dtype != DType::f32)) return "decode takes up to 16 rows of x";
  if (call.int8) return "decode has no int8 activations";
  if (w.K < 1 || w.K > MOST_COLUMNS) return "decode takes 1 to 2^20 columns";
  if (w.N < 0 || w.N * w.G >= MOST_VALUES) return "decode takes fewer than 2^31 groups";
  if (w.blocks || w.row_bytes != (w.K + TILE - 1) / TILE * 32 * w.bits) return "decode reads codes in tiles";
  if (!aligned(w.packed)) return "decode reads codes that begin at a multiple of 16 bytes";
  return nullptr;
}

// Into how many splits K is cut: blocks for all processors, and two slices of K at least for each. M has no say.
inline int splits_of(const Call& call, const Device& device) {
  const int64_t slices = (call.weight.K + SLICE - 1) / SLICE;
  const int64_t wanted = device.processors / std::max(1, row_blocks(call.weight.N));
  return static_cast<int>(std::max<int64_t>(1, std::min({wanted, slices / 2, MOST_SPLITS})));
}

// float32 [splits, M, N]
inline int64_t workspace_bytes(const Call& call, const Device& device) {
  const int splits = splits_of(call, device);
  return splits > 1 ? splits * call.M * call.weight.N * 4 : 0;
}

// Compiled for each width.
template <int BITS>
int launch(const Call& call, const Device& device, void* workspace, Stream stream);

}  // namespace packed_decode
}  // namespace cuda
}  // namespace lowbit
