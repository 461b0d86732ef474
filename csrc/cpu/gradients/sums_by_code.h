// How floats are summed by their codes.
#pragma once
#include "cpu/simd.h"

namespace lowbit {
namespace gradients {
namespace {

constexpr int kPartial = 4;  // histograms: additions to one entry wait for each other

// sums[c] = the sum of values[i] over the i < count with codes[i] == c, for every c < 1 << bits
inline void sum_in_memory(const uint8_t* codes, const float* values, int64_t count, int bits, float* sums) {
  const int64_t entries = int64_t(1) << bits;
  float parts[kPartial][256];
  for (int p = 0; p < kPartial; ++p)
    for (int64_t c = 0; c < entries; ++c) parts[p][c] = 0;
  int64_t i = 0;
  for (; i + kPartial <= count; i += kPartial)
    for (int p = 0; p < kPartial; ++p) parts[p][codes[i + p]] += values[i + p];
  for (; i < count; ++i) parts[0][codes[i]] += values[i];
  for (int64_t c = 0; c < entries; ++c) sums[c] = (parts[0][c] + parts[1][c]) + (parts[2][c] + parts[3][c]);
}

#if defined(__AVX512F__)
// The same. Of 64 codes, one comparison finds those of an entry; what they choose is added to its register.
// Reads 64 codes at a time, and no value past `count`.
template <int bits>
inline void sum_in_registers(const uint8_t* codes, const float* values, int64_t count, float* sums) {
  constexpr int entries = 1 << bits;
  Float sum[entries];
  LOWBIT_UNROLL for (int c = 0; c < entries; ++c) sum[c] = splat(0.0f);
  for (int64_t i = 0; i < count; i += 64) {
    const __m512i code = _mm512_loadu_si512(codes + i);
    const uint64_t valid = count - i < 64 ? (uint64_t(1) << (count - i)) - 1 : ~uint64_t(0);
    Float v[4];
    LOWBIT_UNROLL for (int q = 0; q < 4; ++q)
      v[q] = _mm512_maskz_loadu_ps(__mmask16(valid >> 16 * q), values + i + 16 * q);
    LOWBIT_UNROLL for (int c = 0; c < entries; ++c) {
      const __mmask64 here = _mm512_cmpeq_epi8_mask(code, _mm512_set1_epi8(char(c)));
      LOWBIT_UNROLL for (int q = 0; q < 4; ++q)
        sum[c] = _mm512_mask_add_ps(sum[c], __mmask16(here >> 16 * q), sum[c], v[q]);
    }
  }
  for (int c = 0; c < entries; ++c) sums[c] = 0;
  if constexpr (entries == 2) {
    sum_add(sum[0], sums), sum_add(sum[1], sums + 1);
  } else {
    LOWBIT_UNROLL for (int c = 0; c < entries; c += 4) sum4_add(sum[c], sum[c + 1], sum[c + 2], sum[c + 3], sums + c);
  }
}

inline void sum_by_code(const uint8_t* codes, const float* values, int64_t count, int bits, float* sums) {
  switch (bits) {
    case 1: return sum_in_registers<1>(codes, values, count, sums);
    case 2: return sum_in_registers<2>(codes, values, count, sums);
    case 3: return sum_in_registers<3>(codes, values, count, sums);
    case 4: return sum_in_registers<4>(codes, values, count, sums);
    default: return sum_in_memory(codes, values, count, bits, sums);
  }
}
#else
inline void sum_by_code(const uint8_t* codes, const float* values, int64_t count, int bits, float* sums) {
  sum_in_memory(codes, values, count, bits, sums);
}
#endif

}  // namespace
}  // namespace gradients
}  // namespace lowbit
