// What the gather kernels of the families with packed codes share on the host.
#pragma once
#include "common/operands.h"
#include "cuda/codes.h"
#include "cuda/device.h"
#include "cuda/rows.h"

namespace lowbit {
namespace cuda {
namespace gather {

constexpr int THREADS = 256;
constexpr int64_t MOST = int64_t(1) << 31;

// Columns that a thread stores at a time, and tiles that a block writes.
template <DType T>
constexpr int LANES_OF = T == DType::f32 ? 4 : 8;
template <DType T>
constexpr int UNITS_OF = THREADS * LANES_OF<T> / CHUNK;

// Why no gather kernel takes a call.
template <class Weight>
const char* declines(const Rows<Weight>& call) {
  const Weight& w = call.weight;
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

template <DType T, class Weight>
int blocks_of(const Rows<Weight>& call) {
  const int64_t units = call.count * ((call.weight.K + TILE - 1) / TILE);
  return static_cast<int>((units + UNITS_OF<T> - 1) / UNITS_OF<T>);
}

// Whether the rows of `out` begin at multiples of 16 bytes.
template <class Weight>
bool stores_vectors(const Rows<Weight>& call) {
  return call.weight.K * element_size(call.dtype) % 16 == 0 && reinterpret_cast<uintptr_t>(call.out) % 16 == 0;
}

}  // namespace gather
}  // namespace cuda
}  // namespace lowbit
