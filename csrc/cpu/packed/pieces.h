// The pieces of a row of x. The preprocessor chooses here: masks and narrowing to int8 only exist with AVX-512, so this
// has no meaning on other vectors.
#pragma once
#include "cpu/packed/register_tiles.h"
#include "cpu/quantizer.h"

namespace lowbit {
namespace {

// Three digits in units of 2^lowest_exponent hold the largest element, whose bits are `largest`.
inline int lowest_exponent(uint32_t largest) {
  // Of numbers up to 127 * (1 + 256 + 65536), 0x7f7f7f, the digits fit.
  return int(max64(int64_t((largest + 0x010101) >> 23) - 127, -80)) - 22;
}

inline float power_of_two(int exponent) { return float_of(uint32_t(127 + exponent) << 23); }

// Elements of a segment of x: the largest (its bits), the sums of magnitudes and of squares.
struct Survey {
  uint32_t largest;
  float magnitudes, squares;
};

// Where kHasVnni:
//   survey(x, n)
//   held_off(x, n, low, share): the sum of |x - q| - share * |x| where positive, q the multiple of 2^low next to x
//   to_pieces(x, n, words, rows, sums, low, four): the digits of x[0:n] in units of 2^(low - 8), lowest first; the
//     lowest is 0 but where `four`. n is a multiple of 4. One digit of four neighbours is a word,
//     words[i / 4 * rows + digit]; sums[digit] becomes the sum of a digit.
#if defined(__AVX512VNNI__)
inline __mmask16 first_lanes(int64_t n) { return __mmask16((1u << min64(n, 16)) - 1); }

inline Survey survey(const float* x, int64_t n) {
  Int largest = zero_int();
  Float magnitudes = splat(0.0f), squares = magnitudes;
  for (int64_t i = 0; i < n; i += 16) {
    const Float v = _mm512_maskz_loadu_ps(first_lanes(n - i), x + i), size = _mm512_abs_ps(v);
    largest = _mm512_max_epu32(largest, as_int(size));
    magnitudes = magnitudes + size;
    squares = fma(v, v, squares);
  }
  return {_mm512_reduce_max_epu32(largest), _mm512_reduce_add_ps(magnitudes), _mm512_reduce_add_ps(squares)};
}

inline float held_off(const float* x, int64_t n, int low, float share) {
  const Float factor = splat(power_of_two(-low)), unit = splat(power_of_two(low)), allowed = splat(share);
  Float off = splat(0.0f);
  for (int64_t i = 0; i < n; i += 16) {
    const Float v = _mm512_maskz_loadu_ps(first_lanes(n - i), x + i);
    const Float q = _mm512_mul_ps(to_float(_mm512_cvtps_epi32(_mm512_mul_ps(v, factor))), unit);
    const Float beyond = negated_fma(allowed, _mm512_abs_ps(v), _mm512_abs_ps(_mm512_sub_ps(v, q)));
    off = off + _mm512_max_ps(beyond, splat(0.0f));
  }
  return _mm512_reduce_add_ps(off);
}

inline void to_pieces(const float* x, int64_t n, int32_t* words, int64_t rows, float* sums, int low, bool four) {
  const Float factor = splat(power_of_two(four ? 8 - low : -low));
  const __m128i left = _mm_cvtsi32_si128(four ? 0 : 8);
  const Int by_quad = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const Int ones = splat(0x01010101);
  Int total = zero_int();  // of digit p in lane 4 * quad + p
  for (int64_t i = 0; i < n; i += 16) {
    Int v = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_maskz_loadu_ps(first_lanes(n - i), x + i), factor));
    v = _mm512_sll_epi32(v, left);
    __m128i digit[kPieces];
    LOWBIT_UNROLL for (int p = 0; p < kPieces; ++p) {
      digit[p] = _mm512_cvtepi32_epi8(v);
      v = _mm512_srai_epi32(_mm512_add_epi32(v, splat(128)), 8);
    }
    const Int all = _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_set_m128i(digit[1], digit[0])),
                                       _mm256_set_m128i(digit[3], digit[2]), 1);
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
}
#else
inline Survey survey(const float*, int64_t) { absent(); }
inline float held_off(const float*, int64_t, int, float) { absent(); }
inline void to_pieces(const float*, int64_t, int32_t*, int64_t, float*, int, bool) { absent(); }
#endif

}  // namespace
}  // namespace lowbit
