// A factor of a Kronecker product as it is stored, for every kernel of the family.
#pragma once
#include "cuda/codes.h"

namespace lowbit {
namespace cuda {

// Dense, or packed codes in canonical order (lowbit/core/bitpack.py).
struct Stored {
  const void *values, *scales, *zeros;
  int dtype, bits, words, groups, group_size, scales_dtype, zeros_dtype, columns;

  // Element `column` of a row, counted over all terms; a product is rounded.
  LOWBIT_DEVICE float at(int64_t row, int column) const {
    if (bits == 0) return float_at(values, DType(dtype), row * columns + column);
    const int first = column * bits, bit = first % 32;
    const uint32_t* word = static_cast<const uint32_t*>(values) + row * words + first / 32;
    uint32_t code = load(word) >> bit;
    if (bit + bits > 32) code |= load(word + 1) << (32 - bit);
    const int64_t group = row * groups + (groups == 0 ? 0 : column / group_size);
    const float half = static_cast<float>(1 << (bits - 1));
    const float zero = zeros == nullptr ? half : float_at(zeros, DType(zeros_dtype), group);
    const float centered = static_cast<float>(code & ((1u << bits) - 1)) - zero;
    return multiply(centered, float_at(scales, DType(scales_dtype), group));
  }
};

}  // namespace cuda
}  // namespace lowbit
