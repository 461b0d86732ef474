// Launches of packed/gather.cuh.
#pragma once
#include "cuda/codes.h"
#include "cuda/library.h"

namespace lowbit {
namespace cuda {
namespace packed_gather {

using Call = Rows<packed::Weight>;

constexpr int THREADS = 256;
constexpr int64_t MOST = int64_t(1) << 31;

// Columns that a thread stores at a time, and tiles that a block writes.
template <DType T>
constexpr int LANES_OF = T == DType::f32 ? 4 : 8;
template <DType T>
constexpr int UNITS_OF = THREADS * LANES_OF<T> / CHUNK;

inline const char* declines(const Call& call) {
  const packed::Weight& w = call.weight;
  if (call.dtype != DType::f32 && call.dtype != DType::f16 && call.dtype != DType::bf16)
    return "gather writes float32, float16 or bfloat16";
  if (w.K < 1 || w.K >= MOST / 2) return "gather takes 1 to 2^30 columns";
  if (w.N < 0 || w.N * w.G >= MOST) return "gather takes fewer than 2^31 groups";
  const int64_t tile_count = (w.K + TILE - 1) / TILE;
  if (call.count < 0 || call.count >= (MOST - THREADS) / tile_count) return "gather writes fewer than 2^31 tiles";
  if (w.blocks || w.row_bytes != tile_count * 32 * w.bits) return "gather reads codes in tiles";
  if (reinterpret_cast<uintptr_t>(w.packed) % 16 != 0) return "gather reads codes that begin at a multiple of 16 bytes";
  return nullptr;
}

// Compiled for each width.
template <int BITS>
int launch(const Call& call, Stream stream);

}  // namespace packed_gather
}  // namespace cuda
}  // namespace lowbit
