// int8 activations, and outliers: they act on the activations as they are.
#pragma once
#include "cpu/arena.h"
#include "common/operands.h"

namespace lowbit {
namespace {

// The largest |x|, as its bits: they compare as magnitudes do, and NaN > infinity > every number.
inline uint32_t largest_bits(const float* x, int64_t n) {
  uint32_t largest = 0;
  for (int64_t k = 0; k < n; ++k) {
    const uint32_t magnitude = bits_of(x[k]) & 0x7fffffff;
    largest = magnitude > largest ? magnitude : largest;
  }
  return largest;
}

#if defined(__AVX512F__)
inline void store_low(int8_t* to, Int v) { _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(v)); }
inline void store_low(int16_t* to, Int v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(v));
}
#endif

struct Quantizer {
  float inverse;  // q = round(x * inverse) and x ~ q / inverse; NaN marks a row whose result is NaN
  bool zero;      // all codes are zero: x is (nearly) zero or not finite

  // The two roundings of (1 / max) * 127 are those of the activation quantizer that BitNet models train with.
  Quantizer(const float* x, int64_t K, const float* x_scale) {
    const uint32_t largest = largest_bits(x, K);
    const uint32_t infinity = 0x7f800000;
    const float max = float_of(largest);
    zero = true;
    inverse = 1;
    if (largest > infinity || (largest == infinity && !x_scale)) {
      inverse = float_of(0x7fc00000);
    } else if (x_scale || max >= 0x1p-100f) {
      zero = false;
      inverse = x_scale ? 1 / *x_scale : 1 / max * 127;
    }
  }

  template <class Element>
  void operator()(const float* x, int64_t n, Element* q) const {
    int64_t i = 0;
#if defined(__AVX512F__)
    for (; i + 16 <= n; i += 16) {
      const Float v = _mm512_min_ps(_mm512_mul_ps(load(x + i), splat(inverse)), splat(127.0f));
      store_low(q + i, _mm512_cvtps_epi32(_mm512_max_ps(v, splat(-127.0f))));
    }
#endif
    const float round = 12582912;  // 1.5 * 2^23: adding it leaves an integer, rounded half to even
    for (; i < n; ++i) {
      float v = x[i] * inverse;
      v = v < 127 ? v : 127;
      v = v > -127 ? v : -127;
      q[i] = Element(v + round - round);
    }
  }
};

inline int64_t outlier_column(const Outliers& o, int64_t i) {
  return o.wide ? static_cast<const int32_t*>(o.columns)[i] : static_cast<const uint16_t*>(o.columns)[i];
}

inline float outlier_value(const Outliers& o, int64_t i) {
  float v;
  to_float(o.values, o.dtype, i, 1, &v);
  return v;
}

// columns[k, m] = x[m, k] for rows [m_begin, m_end) of x: what add_outlier_products reads
template <class Linear>
void transpose_activations(const Linear& a, int64_t m_begin, int64_t m_end, float* columns) {
  constexpr int64_t kRows = 16, kColumns = 64;
  const int64_t K = a.weight.K;
  float block[kRows][kColumns];
  for (int64_t m = m_begin; m < m_end; m += kRows)
    for (int64_t k = 0; k < K; k += kColumns) {
      const int64_t rows = min64(kRows, m_end - m), width = min64(kColumns, K - k);
      for (int64_t i = 0; i < rows; ++i) to_float(a.x, a.dtype, (m + i) * K + k, width, block[i]);
      for (int64_t j = 0; j < width; ++j)
        for (int64_t i = 0; i < rows; ++i) columns[(k + j) * a.M + m + i] = block[i][j];
    }
}

// acc[(m - m0) * ld + (n - n0)] += sum over the outliers of row n: value * x[m, column], all rows of x at a time.
// `sums` is scratch for m1 - m0 values.
inline void add_outlier_products(const Outliers& o, const float* columns, int64_t M, int64_t m0, int64_t m1, int64_t n0,
                                 int64_t n1, float* sums, float* acc, int64_t ld) {
  for (int64_t n = n0; n < n1; ++n, ++acc) {
    for (int64_t m = 0; m < m1 - m0; ++m) sums[m] = acc[m * ld];
    for (int64_t i = o.rows[n]; i < o.rows[n + 1]; ++i) {
      const float v = outlier_value(o, i);
      const float* x = columns + outlier_column(o, i) * M + m0;
      for (int64_t m = 0; m < m1 - m0; ++m) sums[m] += v * x[m];
    }
    for (int64_t m = 0; m < m1 - m0; ++m) acc[m * ld] = sums[m];
  }
}

}  // namespace
}  // namespace lowbit
