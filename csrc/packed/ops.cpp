#include "ops.h"

#include "../common/arguments.h"
#include "cpu_kernel.h"

namespace lowbit {
namespace packed {
// Found by the type of its argument, so not in the unnamed namespace.
inline __attribute__((always_inline)) void prefetch_row(const Weight& w, int64_t n) {
  lowbit::prefetch_row(static_cast<const Codes&>(w), n);
  if (w.per_tensor) return;
  const auto row = [&](const void* values, DType dtype, int64_t stride) __attribute__((always_inline)) {
    const int64_t size = element_size(dtype);
    prefetch_bytes(static_cast<const char*>(values) + n * stride * size, stride * size);
  };
  row(w.scales, w.scales_dtype, w.scales_row);
  if (w.zeros) row(w.zeros, w.zeros_dtype, w.zeros_row);
}

namespace {

// Scales or zeros: [rows, G], row after row in memory or (as `prepare()` leaves them) group after group.
void check_groups(const char* op, const char* name, const Tensor& t, int64_t rows, int64_t G, int64_t& row,
                  int64_t& group) {
  check_shape(op, name, t, rows, G);
  const bool by_group = rows > 1 && t.stride(0) == 1 && t.stride(1) == rows;
  LOWBIT_CHECK(by_group || t.is_contiguous(), op, ": ", name, " must be contiguous, or its transpose must be");
  row = by_group ? 1 : G;
  group = by_group ? rows : 1;
}

Weight check_weight(const char* op, const Tensor& packed, const Tensor& scales, const OptionalTensor& zeros,
                    const OptionalTensor& outlier_values, const OptionalTensor& outlier_columns,
                    const OptionalTensor& outlier_rows, int64_t bits, int64_t group_size, int64_t K) {
  Weight w{};
  check_codes(op, packed, 2, bits, group_size, K, /*blocks_too=*/true, w);
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
  w.outliers = check_outliers(op, outlier_values, outlier_columns, outlier_rows, w.N, K);
  return w;
}

// Codes that are unpacked together, 32 columns of them, belong to one group of x.
void check_x_group(const char* op, int64_t x_group, bool int8, bool x_scale, const Weight& w) {
  if (x_group == 0) return;
  LOWBIT_CHECK(x_group > 0 && x_group % 32 == 0, op, ": x_group must be 0 (one scale per row of x) or a ",
               "positive multiple of 32: got x_group=", x_group);
  LOWBIT_CHECK(int8 && !x_scale, op, ": x_group is for int8 activations quantized when called: got x_group=", x_group,
               int8 ? " with x_scale" : " with int8=False");
  LOWBIT_CHECK(w.G == 1 || w.group_size % x_group == 0 || x_group % w.group_size == 0, op,
               ": x_group must divide group_size or be a multiple of it: got x_group=", x_group,
               ", group_size=", w.group_size);
}

}  // namespace

Tensor linear_cpu(Tensor x, Tensor packed, Tensor scales, OptionalTensor zeros, OptionalTensor bias,
                  OptionalTensor outlier_values, OptionalTensor outlier_columns, OptionalTensor outlier_rows,
                  OptionalTensor x_scale, int64_t bits, int64_t group_size, bool int8, int64_t x_group) {
  const char* op = "packed_linear";
  const int64_t K = check_activations(op, x);
  Linear a{};
  a.weight =
      check_weight(op, packed, scales, zeros, outlier_values, outlier_columns, outlier_rows, bits, group_size, K);
  check_x_group(op, x_group, int8, x_scale.has_value(), a.weight);
  a.x_group = x_group;
  return run_linear(op, a, x, bias, int8, x_scale, cpu_kernel(current_isa()));
}

Tensor dequantize_cpu(Tensor packed, Tensor scales, OptionalTensor zeros, OptionalTensor outlier_values,
                      OptionalTensor outlier_columns, OptionalTensor outlier_rows, int64_t bits, int64_t group_size,
                      int64_t in_features, ScalarType dtype) {
  const char* op = "packed_dequantize";
  const Weight w = check_weight(op, packed, scales, zeros, outlier_values, outlier_columns, outlier_rows, bits,
                                group_size, in_features);
  return run_dequantize(op, w, dtype, cpu_kernel(current_isa()));
}

Tensor embedding_cpu(Tensor ids, Tensor packed, Tensor scales, OptionalTensor zeros, OptionalTensor outlier_values,
                     OptionalTensor outlier_columns, OptionalTensor outlier_rows, int64_t bits, int64_t group_size,
                     int64_t embedding_dim, ScalarType dtype) {
  const char* op = "packed_embedding";
  check_ids(op, ids);
  const Weight w = check_weight(op, packed, scales, zeros, outlier_values, outlier_columns, outlier_rows, bits,
                                group_size, embedding_dim);
  return run_embedding(op, w, ids, dtype, cpu_kernel(current_isa()));
}

}  // namespace packed
}  // namespace lowbit
