// The CPU implementations of the ops of the family `packed`; schemas, fakes and gradients: lowbit/packed/op.py.
#pragma once
#include <optional>

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

namespace lowbit {
namespace packed {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// y[..., n] = sum_k x[..., k] * w[n, k] + bias[n]
Tensor linear_cpu(Tensor x, Tensor packed, Tensor scales, OptionalTensor zeros, OptionalTensor bias,
                  OptionalTensor outlier_values, OptionalTensor outlier_columns, OptionalTensor outlier_rows,
                  OptionalTensor x_scale, int64_t bits, int64_t group_size, bool int8, int64_t x_group);

// w, [N, K] of `dtype`
Tensor dequantize_cpu(Tensor packed, Tensor scales, OptionalTensor zeros, OptionalTensor outlier_values,
                      OptionalTensor outlier_columns, OptionalTensor outlier_rows, int64_t bits, int64_t group_size,
                      int64_t in_features, ScalarType dtype);

// w[ids], [..., K] of `dtype`
Tensor embedding_cpu(Tensor ids, Tensor packed, Tensor scales, OptionalTensor zeros, OptionalTensor outlier_values,
                     OptionalTensor outlier_columns, OptionalTensor outlier_rows, int64_t bits, int64_t group_size,
                     int64_t embedding_dim, ScalarType dtype);

}  // namespace packed
}  // namespace lowbit
