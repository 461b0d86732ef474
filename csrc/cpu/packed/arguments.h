// The arguments of the CPU ops of the family `packed`: those of common/packed_arguments.h, and the forms that only the CPU
// kernels read.
#pragma once
#include "common/packed_arguments.h"
#include "cpu/packed/weight.h"

namespace lowbit {
namespace packed {

struct MoreArguments {
  const OptionalTensor &scale_factors, &zero_factors;
  bool minimum;
  int64_t scale_block;
};

// The bytes of a row of zeros of `bits` bits.
inline int64_t zero_bytes(int64_t G, int64_t bits) { return (G * bits + 7) / 8; }

// Whether integer zeros are packed: their rows are then shorter than those of scales.
inline bool are_packed(const OptionalTensor& zeros, const Tensor& scales, int64_t bits) {
  return zeros && zeros->scalar_type() == ScalarType::Byte && zeros->dim() == 2 && scales.dim() == 2 &&
         zeros->size(1) < scales.size(1) && zeros->size(1) == zero_bytes(scales.size(1), bits);
}

inline void set_packed_zeros(const Caller& op, const Tensor& zeros, CpuWeight& w) {
  check_groups(op, "zeros", zeros, w.N, zero_bytes(w.G, w.bits), w.zeros_row, w.zeros_group);
  w.packed_zeros = true;
  w.zeros_dtype = DType::u8;
  w.zeros = zeros.const_data_ptr();
}

inline CpuWeight check_cpu_weight(const Caller& op, const WeightArguments& arguments, const MoreArguments& more) {
  const auto& [packed, scales, zeros, outliers, bits, group_size, layout, K] = arguments;
  CpuWeight w{};
  w.minimum = more.minimum;
  const bool packed_zeros = !more.minimum && are_packed(zeros, scales, bits);
  LOWBIT_CHECK(!more.minimum || zeros, op, ": minimum=True needs zeros, which hold the minima");
  if (more.scale_block == 0) {
    const OptionalTensor none;
    static_cast<Weight&>(w) = check_weight(
        op, {packed, scales, packed_zeros ? none : zeros, outliers, bits, group_size, layout, K});
    if (packed_zeros) set_packed_zeros(op, *zeros, w);
    LOWBIT_CHECK(!more.scale_factors && !more.zero_factors, op, ": scale_factors and zero_factors need scale_block");
    LOWBIT_CHECK(!more.minimum || w.zeros_dtype != DType::u8, op, ": minima must be of the dtype of scales (",
                 dtype_name(scales.scalar_type()), "): got ", dtype_name(zeros->scalar_type()));
    return w;
  }
  check_codes(op, packed, 2, bits, group_size, layout, K, /*blocks_too=*/true, w);
  LOWBIT_CHECK(more.scale_block >= 1 && more.scale_block <= w.G, op, ": scale_block must be between 1 and G: got ",
               "scale_block=", more.scale_block, ", G=", w.G);
  w.scale_block = more.scale_block;
  w.factors_row = (w.G - 1) / more.scale_block + 1;
  const bool one = w.N > 1 && w.factors_row == 1 && more.scale_factors && more.scale_factors->dim() == 2 &&
                   more.scale_factors->size(0) == 1;  // for all rows
  const auto floats = [&](const char* name, const OptionalTensor& t) {
    LOWBIT_CHECK(t.has_value(), op, ": scale_block=", more.scale_block, " needs ", name);
    check_stored(op, name, *t, one ? 1 : w.N, w.factors_row);
    return t->const_data_ptr();
  };
  w.scale_factors = floats("scale_factors", more.scale_factors);
  const ScalarType dtype = more.scale_factors->scalar_type(), codes = scales.scalar_type();
  w.factors_dtype = check_float(op, "scale_factors", dtype);
  LOWBIT_CHECK(codes == ScalarType::Byte || codes == ScalarType::Char, op, ": scales must be uint8 or int8 beside ",
               "scale_factors: got ", dtype_name(codes));
  check_groups(op, "scales", scales, w.N, w.G, w.scales_row, w.scales_group);
  w.scales_dtype = DType::u8;
  w.signed_scales = codes == ScalarType::Char;
  w.scales = scales.const_data_ptr();
  if (packed_zeros) {
    set_packed_zeros(op, *zeros, w);
  } else if (zeros) {
    check_groups(op, "zeros", *zeros, w.N, w.G, w.zeros_row, w.zeros_group);
    const ScalarType held = zeros->scalar_type();
    LOWBIT_CHECK(held == ScalarType::Byte || (held == dtype && !more.minimum), op, ": zeros must be uint8",
                 more.minimum ? " beside zero_factors" : " or of the dtype of scale_factors", ": got ",
                 dtype_name(held));
    w.zeros_dtype = held == ScalarType::Byte ? DType::u8 : w.factors_dtype;
    w.zeros = zeros->const_data_ptr();
  }
  LOWBIT_CHECK(more.minimum == more.zero_factors.has_value(), op, ": zero_factors must be given with minimum=True ",
               "and scale_block, and only then");
  if (more.minimum) {
    w.zero_factors = floats("zero_factors", more.zero_factors);
    LOWBIT_CHECK(more.zero_factors->scalar_type() == dtype, op, ": zero_factors must be of the dtype of scale_factors (",
                 dtype_name(dtype), "): got ", dtype_name(more.zero_factors->scalar_type()));
  }
  if (one) w.factors_row = 0;
  w.outliers = check_outliers(op, outliers, w.N, K);
  return w;
}

}  // namespace packed
}  // namespace lowbit
