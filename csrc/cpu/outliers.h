// Outliers in products. They multiply x itself, not its int8 form.
#pragma once
#include "common/operands.h"
#include "cpu/simd.h"

namespace lowbit {
namespace {

inline int64_t outlier_column(const Outliers& o, int64_t i) {
  if (o.wide) return static_cast<const int32_t*>(o.columns)[i];
  uint16_t column;
  std::memcpy(&column, static_cast<const uint8_t*>(o.columns) + 2 * i, 2);
  return column;
}

inline float outlier_value(const Outliers& o, int64_t i) {
  float v;
  to_float(o.values, o.dtype, i, 1, &v);
  return v;
}

// columns[k, m] = x[m, k] for rows [m_begin, m_end) of x: add_outlier_products reads it
template <class Linear>
void transpose_activations(const Linear& a, int64_t m_begin, int64_t m_end, float* columns) {
  constexpr int64_t kRows = 16, kColumns = 64;
  const int64_t K = a.weight.K;
  float square[kRows][kColumns];
  for (int64_t m = m_begin; m < m_end; m += kRows)
    for (int64_t k = 0; k < K; k += kColumns) {
      const int64_t rows = min64(kRows, m_end - m), width = min64(kColumns, K - k);
      for (int64_t i = 0; i < rows; ++i) to_float(a.x, a.dtype, (m + i) * K + k, width, square[i]);
      for (int64_t j = 0; j < width; ++j)
        for (int64_t i = 0; i < rows; ++i) columns[(k + j) * a.M + m + i] = square[i][j];
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
