#include "ops.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include <torch/csrc/stable/ops.h>

#include "../common/checks.h"
#include "../common/scratch.h"
#include "cpu_kernel.h"

namespace lowbit {
namespace packed {
namespace {

constexpr int64_t kTaskElements = 32768;   // rows are converted in tasks of about this many elements
constexpr int64_t kTaskProducts = 131072;  // and multiplied in tasks of about this many products
constexpr int64_t kExpansion = 4;          // expanding a weight costs about as much as this many products

Weight check_weight(const char* op, const Tensor& packed, const Tensor& scales, const OptionalTensor& zeros,
                    const OptionalTensor& outlier_values, const OptionalTensor& outlier_columns,
                    const OptionalTensor& outlier_rows, int64_t bits, int64_t group_size, int64_t K) {
  LOWBIT_CHECK(bits >= 2 && bits <= 8, op, ": bits must be between 2 and 8: got bits=", bits);
  LOWBIT_CHECK(K >= 1, op, ": in_features must be at least 1: got ", K);
  LOWBIT_CHECK(group_size >= 1 && group_size <= K, op, ": group_size must be between 1 and K: got group_size=",
               group_size, ", K=", K);
  LOWBIT_CHECK(packed.dim() == 2, op, ": packed must have two dimensions: got shape ", shape_of(packed));
  LOWBIT_CHECK(packed.scalar_type() == ScalarType::Int, op, ": packed must be int32: got ",
               dtype_name(packed.scalar_type()));
  Weight w{};
  w.N = packed.size(0);
  w.K = K;
  w.group_size = group_size;
  w.G = (K - 1) / group_size + 1;
  w.bits = int(bits);
  const int64_t words = ((K - 1) / 32 + 1) * bits;
  LOWBIT_CHECK(packed.size(1) == words, op, ": packed must have ceil(K/32)*bits = ", words, " words per row for K=", K,
               ", bits=", bits, ": got ", packed.size(1));
  check_stored(op, "packed", packed, w.N, words);
  w.packed = static_cast<const uint8_t*>(packed.const_data_ptr());
  w.row_bytes = words * 4;

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

  const bool outliers = outlier_values.has_value();
  LOWBIT_CHECK(outliers == outlier_columns.has_value() && outliers == outlier_rows.has_value(), op,
               ": outlier_values, outlier_columns and outlier_rows must be given together");
  if (!outliers || outlier_values->numel() == 0) return w;
  const int64_t nnz = outlier_values->numel();
  check_stored(op, "outlier_values", *outlier_values, nnz);
  check_stored(op, "outlier_columns", *outlier_columns, nnz);
  check_stored(op, "outlier_rows", *outlier_rows, w.N + 1);
  w.outlier_dtype = check_float(op, "outlier_values", outlier_values->scalar_type());
  w.outlier_values = outlier_values->const_data_ptr();
  const ScalarType columns = outlier_columns->scalar_type();
  LOWBIT_CHECK(columns == ScalarType::Int || (columns == ScalarType::Short && K <= 32768) ||
                   (columns == ScalarType::UInt16 && K <= 65536),
               op, ": outlier_columns must be int16 (K <= 32768), uint16 (K <= 65536) or int32: got ",
               dtype_name(columns), ", K=", K);
  w.wide_columns = columns == ScalarType::Int;
  w.outlier_columns = outlier_columns->const_data_ptr();
  LOWBIT_CHECK(outlier_rows->scalar_type() == ScalarType::Int, op, ": outlier_rows must be int32: got ",
               dtype_name(outlier_rows->scalar_type()));
  w.outlier_rows = static_cast<const int32_t*>(outlier_rows->const_data_ptr());

  // Row pointers and columns index memory, so their values are checked too.
  bool ordered = w.outlier_rows[0] == 0 && w.outlier_rows[w.N] == nnz;
  for (int64_t n = 0; n < w.N; ++n) ordered &= w.outlier_rows[n] <= w.outlier_rows[n + 1];
  LOWBIT_CHECK(ordered, op, ": outlier_rows must rise from 0 to the number of outliers (", nnz, ")");
  uint32_t largest = 0;  // read as unsigned, a negative column is a large one
  if (w.wide_columns) {
    const uint32_t* c = static_cast<const uint32_t*>(w.outlier_columns);
    for (int64_t i = 0; i < nnz; ++i) largest = std::max(largest, c[i]);
  } else {
    const uint16_t* c = static_cast<const uint16_t*>(w.outlier_columns);
    for (int64_t i = 0; i < nnz; ++i) largest = std::max<uint32_t>(largest, c[i]);
  }
  LOWBIT_CHECK(int64_t(largest) < K, op, ": outlier_columns must be between 0 and K - 1: got ",
               w.wide_columns                   ? int64_t(int32_t(largest))
               : columns == ScalarType::UInt16 ? int64_t(largest)
                                               : int64_t(int16_t(largest)),
               ", K=", K);
  return w;
}

int64_t grain(int64_t task, int64_t per_item) { return std::max<int64_t>(1, task / std::max<int64_t>(1, per_item)); }

}  // namespace

Tensor linear_cpu(Tensor x, Tensor packed, Tensor scales, OptionalTensor zeros, OptionalTensor bias,
                  OptionalTensor outlier_values, OptionalTensor outlier_columns, OptionalTensor outlier_rows,
                  OptionalTensor x_scale, int64_t bits, int64_t group_size, bool int8) {
  const char* op = "packed_linear";
  check_cpu(op, "x", x);
  LOWBIT_CHECK(x.dim() >= 1, op, ": x must have at least one dimension");
  const int64_t K = x.size(x.dim() - 1);
  Linear a{};
  a.dtype = check_float(op, "x", x.scalar_type());
  a.weight =
      check_weight(op, packed, scales, zeros, outlier_values, outlier_columns, outlier_rows, bits, group_size, K);
  if (bias) {
    check_stored(op, "bias", *bias, a.weight.N);
    a.bias_dtype = check_float(op, "bias", bias->scalar_type());
    a.bias = bias->const_data_ptr();
  }
  a.int8 = int8;
  LOWBIT_CHECK(int8 || !x_scale, op, ": x_scale is for int8 activations: got x_scale with int8=False");
  if (x_scale) {
    check_stored(op, "x_scale", *x_scale, 1);
    LOWBIT_CHECK(x_scale->scalar_type() == ScalarType::Float, op, ": x_scale must be float32: got ",
                 dtype_name(x_scale->scalar_type()));
    a.x_scale = static_cast<const float*>(x_scale->const_data_ptr());
    LOWBIT_CHECK(*a.x_scale > 0 && std::isfinite(*a.x_scale) && std::isfinite(1 / *a.x_scale), op,
                 ": x_scale must be positive and finite, and its inverse too: got ", *a.x_scale);
  }

  std::vector<int64_t> shape;
  a.M = 1;
  for (int64_t d = 0; d + 1 < x.dim(); ++d) {
    shape.push_back(x.size(d));
    a.M *= x.size(d);
  }
  shape.push_back(a.weight.N);
  Tensor y = torch::stable::new_empty(x, shape);
  if (a.M == 0 || a.weight.N == 0) return y;
  if (!x.is_contiguous()) x = torch::stable::contiguous(x);
  a.x = x.const_data_ptr();
  a.y = y.mutable_data_ptr();

  const CpuKernel& kernel = cpu_kernel(current_isa());
  Scratch prepared(Slot::prepared, size_t(kernel.prepared_bytes(a)));
  torch::stable::parallel_for(0, a.M, grain(kTaskElements, K), [&](int64_t m0, int64_t m1) {
    kernel.prepare(a, prepared.data(), m0, m1);
  });
  const int64_t tiles = (a.weight.N - 1) / kRowTile + 1;
  torch::stable::parallel_for(
      0, tiles, grain(kTaskProducts, kRowTile * K * (a.M + kExpansion)), [&](int64_t t0, int64_t t1) {
        kernel.linear(a, prepared.data(), t0 * kRowTile, std::min(t1 * kRowTile, a.weight.N));
      });
  return y;
}

Tensor dequantize_cpu(Tensor packed, Tensor scales, OptionalTensor zeros, OptionalTensor outlier_values,
                      OptionalTensor outlier_columns, OptionalTensor outlier_rows, int64_t bits, int64_t group_size,
                      int64_t in_features, ScalarType dtype) {
  const char* op = "packed_dequantize";
  const DType out_dtype = check_float(op, "dtype", dtype);
  const Weight w = check_weight(op, packed, scales, zeros, outlier_values, outlier_columns, outlier_rows, bits,
                                group_size, in_features);
  const std::vector<int64_t> shape{w.N, w.K};
  Tensor out = torch::stable::new_empty(packed, shape, dtype);
  const CpuKernel& kernel = cpu_kernel(current_isa());
  char* base = static_cast<char*>(out.mutable_data_ptr());
  const int64_t row_bytes = w.K * element_size(out_dtype);
  torch::stable::parallel_for(0, w.N, grain(kTaskElements, w.K), [&](int64_t n0, int64_t n1) {
    for (int64_t n = n0; n < n1; ++n) kernel.dequantize(w, n, out_dtype, base + n * row_bytes);
  });
  return out;
}

Tensor embedding_cpu(Tensor ids, Tensor packed, Tensor scales, OptionalTensor zeros, OptionalTensor outlier_values,
                     OptionalTensor outlier_columns, OptionalTensor outlier_rows, int64_t bits, int64_t group_size,
                     int64_t embedding_dim, ScalarType dtype) {
  const char* op = "packed_embedding";
  check_cpu(op, "ids", ids);
  const ScalarType id_type = ids.scalar_type();
  LOWBIT_CHECK(id_type == ScalarType::Int || id_type == ScalarType::Long, op, ": ids must be int32 or int64: got ",
               dtype_name(id_type));
  const DType out_dtype = check_float(op, "dtype", dtype);
  const Weight w = check_weight(op, packed, scales, zeros, outlier_values, outlier_columns, outlier_rows, bits,
                                group_size, embedding_dim);
  std::vector<int64_t> shape;
  for (int64_t d = 0; d < ids.dim(); ++d) shape.push_back(ids.size(d));
  shape.push_back(w.K);
  Tensor out = torch::stable::new_empty(packed, shape, dtype);
  if (!ids.is_contiguous()) ids = torch::stable::contiguous(ids);
  const void* data = ids.const_data_ptr();
  const auto id = [&](int64_t i) -> int64_t {
    return id_type == ScalarType::Int ? static_cast<const int32_t*>(data)[i] : static_cast<const int64_t*>(data)[i];
  };
  const int64_t count = ids.numel();
  for (int64_t i = 0; i < count; ++i)
    LOWBIT_CHECK(id(i) >= 0 && id(i) < w.N, op, ": ids must be in [0, ", w.N, ") (num_embeddings=", w.N,
                 "): got ", id(i));
  const CpuKernel& kernel = cpu_kernel(current_isa());
  char* base = static_cast<char*>(out.mutable_data_ptr());
  const int64_t row_bytes = w.K * element_size(out_dtype);
  torch::stable::parallel_for(0, count, grain(kTaskElements, w.K), [&](int64_t i0, int64_t i1) {
    for (int64_t i = i0; i < i1; ++i) kernel.dequantize(w, id(i), out_dtype, base + i * row_bytes);
  });
  return out;
}

}  // namespace packed
}  // namespace lowbit
