// int8 activations: codes as bytes, and what becomes of the sums. cuda/quantize.cuh makes x integers.
//
// The sums of products of codes and integers are exact int32. Where a row of W has one scale and an integer zero (a sum
// is then `exact`), they stay integers until all of K is added: the same integer in every kernel, whatever its order.
#pragma once
#include "cuda/codes.h"
#include "cuda/int8.h"

namespace lowbit {
namespace cuda {
namespace int8 {

LOWBIT_DEVICE void store_at(void* values, int dtype, int64_t i, float value) {
  if (dtype == static_cast<int>(DType::f32))
    store(static_cast<float*>(values) + i, value);
  else
    store(static_cast<uint16_t*>(values) + i, dtype == static_cast<int>(DType::f16) ? from_float<DType::f16>(value)
                                                                                   : from_float<DType::bf16>(value));
}

// Of two sums: int32 where exact, else float32; as bits.
LOWBIT_DEVICE uint32_t sum_of(uint32_t a, uint32_t b, int exact) {
  return exact ? a + b : bits_of(float_of(a) + float_of(b));
}

// y[m, n] = sum (* scale) / inverse + outliers + bias
LOWBIT_DEVICE void finish(uint32_t bits, float outliers, const float* inverse, const void* scales, const void* bias,
                          void* y, int m, int n, int N, int exact, int scale_row, int scale_dtype, int bias_dtype,
                          int dtype) {
  float sum = float_of(bits);
  if (exact)
    sum = multiply(static_cast<float>(static_cast<int32_t>(bits)),
                   float_at(scales, DType(scale_dtype), static_cast<int64_t>(n) * scale_row));
  sum = sum / load(inverse + m) + outliers;
  if (bias != nullptr) sum += float_at(bias, DType(bias_dtype), n);
  store_at(y, dtype, static_cast<int64_t>(m) * N + n, sum);
}

// The bytes of four columns, column and the next, that are in [begin, end).
LOWBIT_DEVICE uint32_t bytes_inside(int column, int begin, int end) {
  uint32_t mask = 0;
  LOWBIT_UNROLL
  for (int i = 0; i < 4; ++i)
    if (column + i >= begin && column + i < end) mask |= 0xFFu << 8 * i;
  return mask;
}

// The codes of a row of a tile as bytes, chunk after chunk. Of a plane a thread holds fields of 16 bits, a lane each.
// Their low and high bytes are put together first: each holds several chunks.
template <int BITS>
struct Bytes {
  static constexpr int WIDTH = BITS == 8 ? 8 : BITS >= 4 ? 4 : 2;  // of the widest plane
  static constexpr uint32_t EACH = 0x01010101u;
  uint32_t widest[2], pairs[2];

  // The bytes of lanes 8t + 4i .. 8t + 4i + 3, of a plane of this width, in which `chunk` is.
  template <int FIELD>
  LOWBIT_DEVICE static void gather(uint32_t (&bytes)[2], const Words4& part, int chunk) {
    if (chunk % (8 / FIELD) != 0) return;
    const uint32_t which = chunk / (8 / FIELD) % 2 ? 0x7531u : 0x6420u;
    bytes[0] = permute_bytes(part.x, part.y, which), bytes[1] = permute_bytes(part.z, part.w, which);
  }

  // Comes before of() for every chunk of a tile, in their order.
  LOWBIT_DEVICE void next_chunk(const TileRow<BITS>& row, int chunk) {
    if constexpr (BITS > 1) gather<WIDTH>(widest, row.parts[chunk / (16 / WIDTH)], chunk);
    if constexpr (BITS == 6 || BITS == 7) gather<2>(pairs, row.parts[2], chunk);
  }

  LOWBIT_DEVICE static uint32_t moved(uint32_t bits, int down) { return down >= 0 ? bits >> down : bits << -down; }

  // Columns 32 * chunk + 8t + 4i and the next three.
  LOWBIT_DEVICE uint32_t of(const TileRow<BITS>& row, int chunk, int i) const {
    uint32_t codes = 0;
    if constexpr (BITS == 8) return widest[i];
    if constexpr (BITS > 1) codes = widest[i] >> chunk % (8 / WIDTH) * WIDTH & ((1u << WIDTH) - 1) * EACH;
    if constexpr (BITS == 6 || BITS == 7)
      codes = masked_or(moved(pairs[i], chunk % 4 * 2 - 4), 0x30u * EACH, codes);
    if constexpr (BITS % 2)
      codes = masked_or(moved(i ? row.octets.y : row.octets.x, chunk - (BITS - 1)), EACH << (BITS - 1), codes);
    return codes;
  }
};

}  // namespace int8
}  // namespace cuda
}  // namespace lowbit
