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

inline CpuWeight check_cpu_weight(const Caller& op, const WeightArguments& arguments, const MoreArguments& more) {
  const auto& [packed, scales, zeros, outliers, bits, group_size, layout, K] = arguments;
  CpuWeight w{};
  w.minimum = more.minimum;
  LOWBIT_CHECK(!more.minimum || zeros, op, ": minimum=True needs zeros, which hold the minima");
  if (more.scale_block == 0) {
    static_cast<Weight&>(w) = check_weight(op, arguments);
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
  const auto floats = [&](const char* name, const OptionalTensor& t) {
    LOWBIT_CHECK(t.has_value(), op, ": scale_block=", more.scale_block, " needs ", name);
    check_stored(op, name, *t, w.N, w.factors_row);
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
  if (zeros) {
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
  w.outliers = check_outliers(op, outliers, w.N, K);
  return w;
}

}  // namespace packed
}  // namespace lowbit
