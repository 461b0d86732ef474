#include "ops.h"

#include "../common/arguments.h"
#include "cpu_kernel.h"

namespace lowbit {
namespace codebook {
// Found by the type of its argument, so not in the unnamed namespace.
inline __attribute__((always_inline)) void prefetch_row(const Weight& w, int64_t n) {
  lowbit::prefetch_row(static_cast<const Codes&>(w), n);
  const auto row = [&](const void* values, DType dtype, int64_t count) __attribute__((always_inline)) {
    const int64_t bytes = count * element_size(dtype);
    prefetch_bytes(static_cast<const char*>(values) + n * bytes, bytes);
  };
  if (w.scales) row(w.scales, w.scales_dtype, w.G);
  if (w.tables != Weight::Tables::tensor)
    row(w.codebook, w.codebook_dtype, (w.tables == Weight::Tables::row ? 1 : w.G) << w.bits);
}

namespace {

const void* check_nested(const char* op, const char* name, const Tensor& t, int64_t count) {
  check_stored(op, name, t, count);
  LOWBIT_CHECK(t.scalar_type() == ScalarType::Float, op, ": ", name, " must be float32: got ",
               dtype_name(t.scalar_type()));
  return t.const_data_ptr();
}

Weight check_weight(const char* op, const Tensor& packed, const Tensor& codebook, const OptionalTensor& scales,
                    const OptionalTensor& scale_codebook, const OptionalTensor& scale_absmax,
                    const OptionalTensor& scale_offset, const OptionalTensor& outlier_values,
                    const OptionalTensor& outlier_columns, const OptionalTensor& outlier_rows, int64_t bits,
                    int64_t group_size, int64_t K) {
  Weight w{};
  check_codes(op, packed, 1, bits, group_size, K, /*blocks_too=*/false, w);

  check_cpu(op, "codebook", codebook);
  const int64_t entries = int64_t(1) << bits;
  const auto shaped = [&](int64_t rows, int64_t groups) {
    return codebook.dim() == 3 && codebook.size(0) == rows && codebook.size(1) == groups && codebook.size(2) == entries;
  };
  const bool tensor = shaped(1, 1), row = shaped(w.N, 1), group = shaped(w.N, w.G);
  LOWBIT_CHECK(tensor || row || group, op, ": codebook must be of shape [1, 1, ", entries, "], [N, 1, ", entries,
               "] or [N, G, ", entries, "] for bits=", bits, ", N=", w.N, ", G=", w.G, ": got ", shape_of(codebook));
  LOWBIT_CHECK(codebook.is_contiguous(), op, ": codebook must be contiguous");
  w.tables = tensor ? Weight::Tables::tensor : row ? Weight::Tables::row : Weight::Tables::group;
  w.codebook_dtype = check_float(op, "codebook", codebook.scalar_type());
  w.codebook = codebook.const_data_ptr();

  const bool nested = scale_codebook.has_value();
  LOWBIT_CHECK(nested == scale_absmax.has_value() && nested == scale_offset.has_value(), op,
               ": scale_codebook, scale_absmax and scale_offset must be given together");
  LOWBIT_CHECK(scales || !nested, op, ": scales must be given with scale_codebook, scale_absmax and scale_offset");
  if (scales) {
    check_stored(op, "scales", *scales, w.N, w.G);
    const ScalarType dtype = scales->scalar_type();
    if (nested) {
      LOWBIT_CHECK(dtype == ScalarType::Byte, op, ": scales must be uint8 with scale_codebook: got ",
                   dtype_name(dtype));
      w.scales_dtype = DType::u8;
      w.nested.codebook = static_cast<const float*>(check_nested(op, "scale_codebook", *scale_codebook, 256));
      w.nested.absmax =
          static_cast<const float*>(check_nested(op, "scale_absmax", *scale_absmax, (w.N * w.G + 255) / 256));
      w.nested.offset = static_cast<const float*>(check_nested(op, "scale_offset", *scale_offset, 1));
    } else {
      w.scales_dtype = check_float(op, "scales", dtype);
    }
    w.scales = scales->const_data_ptr();
  } else if (w.tables != Weight::Tables::group) {
    w.G = 1;
    w.group_size = K;
  }
  w.outliers = check_outliers(op, outlier_values, outlier_columns, outlier_rows, w.N, K);
  return w;
}

}  // namespace

Tensor linear_cpu(Tensor x, Tensor packed, Tensor codebook, OptionalTensor scales, OptionalTensor scale_codebook,
                  OptionalTensor scale_absmax, OptionalTensor scale_offset, OptionalTensor bias,
                  OptionalTensor outlier_values, OptionalTensor outlier_columns, OptionalTensor outlier_rows,
                  OptionalTensor x_scale, int64_t bits, int64_t group_size, bool int8, bool /*mean_gradient*/) {
  const char* op = "codebook_linear";
  const int64_t K = check_activations(op, x);
  Linear a{};
  a.weight = check_weight(op, packed, codebook, scales, scale_codebook, scale_absmax, scale_offset, outlier_values,
                          outlier_columns, outlier_rows, bits, group_size, K);
  return run_linear(op, a, x, bias, int8, x_scale, cpu_kernel(current_isa()));
}

Tensor dequantize_cpu(Tensor packed, Tensor codebook, OptionalTensor scales, OptionalTensor scale_codebook,
                      OptionalTensor scale_absmax, OptionalTensor scale_offset, OptionalTensor outlier_values,
                      OptionalTensor outlier_columns, OptionalTensor outlier_rows, int64_t bits, int64_t group_size,
                      int64_t in_features, ScalarType dtype) {
  const char* op = "codebook_dequantize";
  const Weight w = check_weight(op, packed, codebook, scales, scale_codebook, scale_absmax, scale_offset,
                                outlier_values, outlier_columns, outlier_rows, bits, group_size, in_features);
  return run_dequantize(op, w, dtype, cpu_kernel(current_isa()));
}

Tensor embedding_cpu(Tensor ids, Tensor packed, Tensor codebook, OptionalTensor scales, OptionalTensor scale_codebook,
                     OptionalTensor scale_absmax, OptionalTensor scale_offset, OptionalTensor outlier_values,
                     OptionalTensor outlier_columns, OptionalTensor outlier_rows, int64_t bits, int64_t group_size,
                     int64_t embedding_dim, ScalarType dtype, bool /*mean_gradient*/) {
  const char* op = "codebook_embedding";
  check_ids(op, ids);
  const Weight w = check_weight(op, packed, codebook, scales, scale_codebook, scale_absmax, scale_offset,
                                outlier_values, outlier_columns, outlier_rows, bits, group_size, embedding_dim);
  return run_embedding(op, w, ids, dtype, cpu_kernel(current_isa()));
}

}  // namespace codebook
}  // namespace lowbit
