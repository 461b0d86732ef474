// Entries of tables and scales of the family `codebook`, as they are stored.
#pragma once
#include <type_traits>

#include "common/codebook.h"
#include "cuda/codes.h"

namespace lowbit {
namespace cuda {
namespace codebook_stored {

// Entries from a row's table to the next row's, and from a group's to the next group's.
inline int64_t table_row(const codebook::Weight& w) {
  using Tables = codebook::Weight::Tables;
  return w.tables == Tables::tensor ? 0 : w.tables == Tables::row ? int64_t(1) << w.bits : w.G << w.bits;
}

inline int64_t table_group(const codebook::Weight& w) {
  return w.tables == codebook::Weight::Tables::group ? int64_t(1) << w.bits : 0;
}

// function(std::integral_constant<DType, dtype>()): loads of one dtype do not wait for each other.
template <class Function>
LOWBIT_DEVICE void with_float_dtype(int dtype, Function function) {
  if (DType(dtype) == DType::f32)
    function(std::integral_constant<DType, DType::f32>());
  else if (DType(dtype) == DType::f16)
    function(std::integral_constant<DType, DType::f16>());
  else
    function(std::integral_constant<DType, DType::bf16>());
}

// What is stored, as float32.
template <DType STORED>
LOWBIT_DEVICE float value_at(const void* values, int64_t i) {
  if constexpr (STORED == DType::f32) return load(static_cast<const float*>(values) + i);
  return to_float<STORED>(load(static_cast<const uint16_t*>(values) + i));
}

// The scale of row n and group g is number n * G + g.
struct Scales {
  const void* values;  // [N, G]; null: 1
  int dtype;
  const float *codebook, *absmax, *offset;  // of nested scales (common/codebook.h), or null

  LOWBIT_DEVICE float at(int64_t i) const {
    if (values == nullptr) return 1.0f;
    if (codebook == nullptr) return float_at(values, DType(dtype), i);
    const int code = load(static_cast<const uint8_t*>(values) + i);
    return multiply(load(codebook + code), load(absmax + i / 256)) + load(offset);
  }

  // Two at a time, which do not wait for each other.
  LOWBIT_DEVICE void read(float (&scale)[2], const int64_t (&at)[2]) const {
    if (values == nullptr) {
      scale[0] = scale[1] = 1.0f;
    } else if (codebook != nullptr) {
      const uint8_t* codes = static_cast<const uint8_t*>(values);
      const int code[2] = {load(codes + at[0]), load(codes + at[1])};
      LOWBIT_UNROLL
      for (int half = 0; half < 2; ++half)
        scale[half] = multiply(load(codebook + code[half]), load(absmax + at[half] / 256)) + load(offset);
    } else {
      with_float_dtype(dtype, [&](auto stored) {
        LOWBIT_UNROLL
        for (int half = 0; half < 2; ++half) scale[half] = value_at<decltype(stored)::value>(values, at[half]);
      });
    }
  }
};

// Entries of 16 bits, rounded from what is stored.
template <DType T, DType STORED>
LOWBIT_DEVICE uint32_t entry_at(const void* codebook, int64_t i) {
  if constexpr (STORED == T) return load(static_cast<const uint16_t*>(codebook) + i);
  return from_float<T>(value_at<STORED>(codebook, i));
}

}  // namespace codebook_stored
}  // namespace cuda
}  // namespace lowbit
