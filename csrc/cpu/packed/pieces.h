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
//   to_pieces<kFour>(x, n, low, share, words, rows, lowest, lowest_rows, sums): the digits of q, the integers next to
//     x[0:n] in units of 2^low, of 2^(low - 8) where kFour; n is a multiple of 4. A digit of four neighbours is a word:
//     the three upper ones, lowest first, words[i / 4 * rows + digit], the fourth, lower one lowest[i / 4 * lowest_rows].
//     sums[digit] becomes the sum of a digit, all four from the lowest. Returns the sum of |x - q| - share * |x| where
//     that is positive.
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

template <bool kFour>
inline float to_pieces(const float* x, int64_t n, int low, float share, int32_t* words, int64_t rows, int32_t* lowest,
                       int64_t lowest_rows, float* sums) {
  constexpr int kDigits = kFour ? 4 : 3;
  const int unit_exponent = kFour ? low - 8 : low;
  const Float factor = splat(power_of_two(-unit_exponent)), unit = splat(power_of_two(unit_exponent));
  const Float allowed = splat(share);
  const Int by_quad = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const Int ones = splat(0x01010101);
  Int total = zero_int();  // of digit p in lane 4 * quad + p
  Float off = splat(0.0f);
  for (int64_t i = 0; i < n; i += 16) {
    const Float v = _mm512_maskz_loadu_ps(first_lanes(n - i), x + i);
    Int q = _mm512_cvtps_epi32(_mm512_mul_ps(v, factor));
    const Float size = _mm512_abs_ps(v), error = _mm512_abs_ps(negated_fma(to_float(q), unit, v));
    off = off + _mm512_max_ps(negated_fma(allowed, size, error), splat(0.0f));
    __m128i digit[4] = {_mm_setzero_si128(), _mm_setzero_si128(), _mm_setzero_si128(), _mm_setzero_si128()};
    LOWBIT_UNROLL for (int p = 4 - kDigits; p < 4; ++p) {
      digit[p] = _mm512_cvtepi32_epi8(q);
      if (p < 3) q = _mm512_srai_epi32(_mm512_add_epi32(q, splat(128)), 8);
    }
    const Int all = _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_set_m128i(digit[1], digit[0])),
                                       _mm256_set_m128i(digit[3], digit[2]), 1);
    const Int quads = _mm512_permutexvar_epi32(by_quad, all);  // [quad, digit]
    total = dot4<true>(total, ones, quads);
    int32_t out[16];
    store(out, quads);
    for (int64_t j = 0; j < min64(n - i, 16) / 4; ++j) {
      std::memcpy(words + (i / 4 + j) * rows, out + 4 * j + 1, kPieces * sizeof(int32_t));
      lowest[(i / 4 + j) * lowest_rows] = out[4 * j];
    }
  }
  int32_t lanes[16];
  store(lanes, total);
  for (int p = 0; p < 4; ++p) sums[p] = float(lanes[p] + lanes[4 + p] + lanes[8 + p] + lanes[12 + p]);
  return _mm512_reduce_add_ps(off);
}
#else
inline Survey survey(const float*, int64_t) { absent(); }
template <bool kFour>
inline float to_pieces(const float*, int64_t, int, float, int32_t*, int64_t, int32_t*, int64_t, float*) {
  absent();
}
#endif

}  // namespace
}  // namespace lowbit
