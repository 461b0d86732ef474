// The arguments of the ops of the family `packed` (declared in lowbit/packed/op.py), checked and turned into an
// operand.
#pragma once
#include "common/arguments.h"
#include "common/packed.h"

namespace lowbit {
namespace packed {

// The weight's part of an op's arguments.
struct WeightArguments {
  const Tensor &packed, &scales;
  const OptionalTensor& zeros;
  OutlierArguments outliers;
  int64_t bits, group_size, layout, K;
};

// Scales or zeros: [rows, G], row after row in memory or, as the layer's `prepare()` stores them, group after group; then
// they may be some of the rows of a larger weight.
inline void check_groups(const Caller& op, const char* name, const Tensor& t, int64_t rows, int64_t G, int64_t& row,
                  int64_t& group) {
  check_shape(op, name, t, rows, G);
  const bool by_group = rows > 1 && G > 1 && t.stride(0) == 1 && t.stride(1) >= rows;
  LOWBIT_CHECK(by_group || t.is_contiguous(), op, ": ", name, " must be contiguous, or its transpose must be");
  row = by_group ? 1 : G;
  group = by_group ? t.stride(1) : 1;
}

inline Weight check_weight(const Caller& op, const WeightArguments& arguments) {
  const auto& [packed, scales, zeros, outliers, bits, group_size, layout, K] = arguments;
  Weight w{};
  check_codes(op, packed, 2, bits, group_size, layout, K, /*blocks_too=*/true, w);
  w.per_tensor = w.G == 1 && w.N != 1 && scales.dim() == 2 && scales.size(0) == 1;
  const int64_t rows = w.per_tensor ? 1 : w.N;
  check_groups(op, "scales", scales, rows, w.G, w.scales_row, w.scales_group);
  w.scales_dtype = check_float(op, "scales", scales.scalar_type());
  w.scales = scales.const_data_ptr();
  if (zeros) {
    check_groups(op, "zeros", *zeros, rows, w.G, w.zeros_row, w.zeros_group);
    const ScalarType dtype = zeros->scalar_type();
    LOWBIT_CHECK(dtype == ScalarType::Byte || dtype == scales.scalar_type(), op,
                 ": zeros must be uint8 or of the dtype of scales (", dtype_name(scales.scalar_type()), "): got ",
                 dtype_name(dtype));
    w.zeros_dtype = dtype == ScalarType::Byte ? DType::u8 : w.scales_dtype;
    w.zeros = zeros->const_data_ptr();
  }
  w.outliers = check_outliers(op, outliers, w.N, K);
  return w;
}

// A chunk of 32 codes is unpacked together, so its columns must belong to one group of x.
inline void check_x_group(const Caller& op, const ActivationArguments& x, const Weight& w) {
  const int64_t x_group = x.x_group;
  if (x_group == 0) return;
  LOWBIT_CHECK(x_group > 0 && x_group % 32 == 0, op, ": x_group must be 0 (one scale per row of x) or a ",
               "positive multiple of 32: got x_group=", x_group);
  LOWBIT_CHECK(x.int8 && !x.x_scale, op, ": x_group is for int8 activations quantized when called: got x_group=",
               x_group, x.int8 ? " with x_scale" : " with int8=False");
  LOWBIT_CHECK(w.G == 1 || w.group_size % x_group == 0 || x_group % w.group_size == 0, op,
               ": x_group must divide group_size or be a multiple of it: got x_group=", x_group,
               ", group_size=", w.group_size);
}

}  // namespace packed
}  // namespace lowbit
