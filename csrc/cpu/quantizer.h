// int8 activations: one row of x, or one group of its columns, and the scale that makes it integers.
#pragma once
#include "cpu/simd.h"

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
    int64_t i = round_vectors(x, n, inverse, 127.0f, q);
    const float round = 12582912;  // 1.5 * 2^23: adding it leaves an integer, rounded half to even
    for (; i < n; ++i) {
      float v = x[i] * inverse;
      v = v < 127 ? v : 127;
      v = v > -127 ? v : -127;
      q[i] = Element(v + round - round);
    }
  }
};

}  // namespace
}  // namespace lowbit
