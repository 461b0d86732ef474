// The CPU implementations of the ops of the family `kron`; schemas, fakes and gradients: lowbit/kron/op.py.
#pragma once
#include <optional>

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

namespace lowbit {
namespace kron {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// y[..., n] = sum_k x[..., k] * w[n, k] + bias[n]
Tensor linear_cpu(Tensor x, Tensor a, OptionalTensor a_scales, OptionalTensor a_zeros, Tensor b,
                  OptionalTensor b_scales, OptionalTensor b_zeros, OptionalTensor bias,
                  OptionalTensor input_permutation, OptionalTensor output_permutation, int64_t rank, int64_t n1,
                  int64_t k1, int64_t n2, int64_t k2, int64_t a_bits, int64_t a_group_size, int64_t b_bits,
                  int64_t b_group_size);

// w, [N, K] of `dtype`
Tensor dequantize_cpu(Tensor a, OptionalTensor a_scales, OptionalTensor a_zeros, Tensor b, OptionalTensor b_scales,
                      OptionalTensor b_zeros, OptionalTensor input_permutation, OptionalTensor output_permutation,
                      int64_t rank, int64_t n1, int64_t k1, int64_t n2, int64_t k2, int64_t a_bits,
                      int64_t a_group_size, int64_t b_bits, int64_t b_group_size, ScalarType dtype);

// w[ids], [..., K] of `dtype`
Tensor embedding_cpu(Tensor ids, Tensor a, OptionalTensor a_scales, OptionalTensor a_zeros, Tensor b,
                     OptionalTensor b_scales, OptionalTensor b_zeros, OptionalTensor input_permutation,
                     OptionalTensor output_permutation, int64_t rank, int64_t n1, int64_t k1, int64_t n2, int64_t k2,
                     int64_t a_bits, int64_t a_group_size, int64_t b_bits, int64_t b_group_size, ScalarType dtype);

}  // namespace kron
}  // namespace lowbit
