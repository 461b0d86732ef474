// int8 activations and a weight of the family `codebook`: its integers, and what becomes of sums.
//
// They meet as integers (lowbit/codebook/operands.py). Row n of the weight is T * step[n], T in -32767 .. 32767:
//
//   step[n] = scales[n].abs().max() * codebook[n].abs().max() / 32767, or 1 where that is below 2^-126
//   T = (codebook[n, group, code] * scales[n, group] * (1 / step[n])).round(), halves to even
//
// T is two bytes, T = 256 * high + low, high with a sign, so two products with int32 sums are exact.
#pragma once
#include "cuda/codebook/int8.h"
#include "cuda/codebook/stored.h"

namespace lowbit {
namespace cuda {
namespace codebook_int8 {

using namespace codebook_stored;

constexpr float LARGEST = 32767.0f;

// T in the low 16 bits. Adding 1.5 * 2^23 leaves no bit for a fraction.
LOWBIT_DEVICE uint32_t fixed(float weight, float inverse_step) {
  float scaled = multiply(weight, inverse_step);
  scaled = scaled < LARGEST ? scaled : LARGEST;
  scaled = scaled > -LARGEST ? scaled : -LARGEST;
  return bits_of(scaled + 12582912.0f);
}

// y[m, n] = sum * step[n] / inverse[m] + outliers[n] @ x[m] + bias[n]. Outliers multiply x as it is, in their order.
struct Finish {
  const float *inverse, *steps;
  const void *bias, *outlier_values, *outlier_columns;
  const int32_t* outlier_rows;
  const void* x;
  void* y;
  int N, K, bias_dtype, outlier_dtype, wide_columns, dtype;

  LOWBIT_DEVICE void operator()(int64_t low, int64_t high, int m, int n) const {
    float sum = multiply(static_cast<float>(256 * high + low), load(steps + n)) / load(inverse + m);
    if (outlier_values != nullptr) {
      float outliers = 0.0f;
      const int end = load(outlier_rows + n + 1);
      for (int i = load(outlier_rows + n); i < end; ++i) {
        const int column = wide_columns ? load(static_cast<const int32_t*>(outlier_columns) + i)
                                        : load(static_cast<const uint16_t*>(outlier_columns) + i);
        outliers = fused_multiply_add(float_at(outlier_values, DType(outlier_dtype), i),
                                      float_at(x, DType(dtype), static_cast<int64_t>(m) * K + column), outliers);
      }
      sum += outliers;
    }
    if (bias != nullptr) sum += float_at(bias, DType(bias_dtype), n);
    const int64_t at = static_cast<int64_t>(m) * N + n;
    if (DType(dtype) == DType::f32)
      store(static_cast<float*>(y) + at, sum);
    else
      store(static_cast<uint16_t*>(y) + at,
            DType(dtype) == DType::f16 ? from_float<DType::f16>(sum) : from_float<DType::bf16>(sum));
  }
};

}  // namespace codebook_int8
}  // namespace cuda
}  // namespace lowbit
