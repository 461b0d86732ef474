#include "ops.h"

#include "../common/arguments.h"
#include "cpu_kernel.h"

namespace lowbit {
namespace packed {
namespace {

Weight check_weight(const char* op, const Tensor& packed, const Tensor& scales, const OptionalTensor& zeros,
                    const OptionalTensor& outlier_values, const OptionalTensor& outlier_columns,
                    const OptionalTensor& outlier_rows, int64_t bits, int64_t group_size, int64_t K) {
  Weight w{};
  check_codes(op, packed, 2, bits, group_size, K, w);
  w.per_tensor = w.G == 1 && w.N != 1 && scales.dim() == 2 && scales.size(0) == 1;
  const int64_t rows = w.per_tensor ? 1 : w.N;
  check_stored(op, "scales", scales, rows, w.G);
  w.scales_dtype = check_float(op, "scales", scales.scalar_type());
  w.scales = scales.const_data_ptr();
  if (zeros) {
    check_stored(op, "zeros", *zeros, rows, w.G);
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

}  // namespace

Tensor linear_cpu(Tensor x, Tensor packed, Tensor scales, OptionalTensor zeros, OptionalTensor bias,
                  OptionalTensor outlier_values, OptionalTensor outlier_columns, OptionalTensor outlier_rows,
                  OptionalTensor x_scale, int64_t bits, int64_t group_size, bool int8) {
  const char* op = "packed_linear";
  const int64_t K = check_activations(op, x);
  Linear a{};
  a.weight =
      check_weight(op, packed, scales, zeros, outlier_values, outlier_columns, outlier_rows, bits, group_size, K);
  return run_linear(op, a, x, bias, int8, x_scale, cpu_kernel(current_isa()));
}

Tensor dequantize_cpu(Tensor packed, Tensor scales, OptionalTensor zeros, OptionalTensor outlier_values,
                      OptionalTensor outlier_columns, OptionalTensor outlier_rows, int64_t bits, int64_t group_size,
                      int64_t in_features, ScalarType dtype) {
  const char* op = "packed_dequantize";
  const Weight w = check_weight(op, packed, scales, zeros, outlier_values, outlier_columns, outlier_rows, bits,
                                group_size, in_features);
  return run_dequantize(op, w, packed, dtype, cpu_kernel(current_isa()));
}

Tensor embedding_cpu(Tensor ids, Tensor packed, Tensor scales, OptionalTensor zeros, OptionalTensor outlier_values,
                     OptionalTensor outlier_columns, OptionalTensor outlier_rows, int64_t bits, int64_t group_size,
                     int64_t embedding_dim, ScalarType dtype) {
  const char* op = "packed_embedding";
  check_ids(op, ids);
  const Weight w = check_weight(op, packed, scales, zeros, outlier_values, outlier_columns, outlier_rows, bits,
                                group_size, embedding_dim);
  return run_embedding(op, w, ids, packed, dtype, cpu_kernel(current_isa()));
}

}  // namespace packed
}  // namespace lowbit
