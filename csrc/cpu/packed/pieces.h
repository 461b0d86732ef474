// The pieces of a row of x. The preprocessor chooses here: masks and narrowing to int8 only exist with AVX-512, so this
// has no meaning on other vectors.
#pragma once
#include "cpu/packed/register_tiles.h"
#include "cpu/quantizer.h"

namespace lowbit {
namespace {

// The digits of x[0:n], lowest first; n is a multiple of 4. One digit of four neighbours is a word,
// words[i / 4 * rows + digit]. sums[digit] becomes the sum of a digit. Returns the value of one unit. Where kHasVnni.
#if defined(__AVX512VNNI__)
inline float to_pieces(const float* x, int64_t n, int32_t* words, int64_t rows, float* sums) {
  const uint32_t largest = largest_bits(x, n);
  // Of numbers up to 127 * (1 + 256 + 65536), 0x7f7f7f, the digits fit.
  const int exponent = int(max64(int64_t((largest + 0x010101) >> 23) - 127, -80)), low = exponent - 22;
  const Float factor = splat(float_of(uint32_t(127 - low) << 23));
  const Int by_quad = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const Int ones = splat(0x01010101);
  Int total = zero_int();  // of digit p in lane 4 * quad + p
  for (int64_t i = 0; i < n; i += 16) {
    const __mmask16 some = __mmask16((1u << min64(n - i, 16)) - 1);
    Int v = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_maskz_loadu_ps(some, x + i), factor));
    __m128i digit[kPieces];
    LOWBIT_UNROLL for (int p = 0; p < kPieces; ++p) {
      digit[p] = _mm512_cvtepi32_epi8(v);
      v = _mm512_srai_epi32(_mm512_add_epi32(v, splat(128)), 8);
    }
    const Int all = _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_set_m128i(digit[1], digit[0])),
                                       _mm256_castsi128_si256(digit[2]), 1);
    const Int quads = _mm512_permutexvar_epi32(by_quad, all);  // [quad, digit]
    total = dot4<true>(total, ones, quads);
    int32_t out[16];
    store(out, quads);
    for (int64_t q = 0; q < min64(n - i, 16) / 4; ++q)
      std::memcpy(words + (i / 4 + q) * rows, out + 4 * q, kPieces * sizeof(int32_t));
  }
  int32_t lanes[16];
  store(lanes, total);
  for (int p = 0; p < kPieces; ++p) sums[p] = float(lanes[p] + lanes[4 + p] + lanes[8 + p] + lanes[12 + p]);
  return float_of(uint32_t(127 + low) << 23);
}
#else
inline float to_pieces(const float*, int64_t, int32_t*, int64_t, float*) { absent(); }
#endif

}  // namespace
}  // namespace lowbit
