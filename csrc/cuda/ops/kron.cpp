#include "cuda/ops/kron.h"

#include "common/kron_arguments.h"
#include "cpu/invariance.h"
#include "cuda/ops/library.h"

namespace lowbit {
namespace cuda {
namespace {

// y[..., n] = sum_k x[..., k] * w[n, k] + bias[n]
template <class Result>
Result linear(Tensor x, Tensor a, OptionalTensor a_scales, OptionalTensor a_zeros, Tensor b, OptionalTensor b_scales,
              OptionalTensor b_zeros, OptionalTensor input_permutation, OptionalTensor output_permutation, int64_t rank,
              int64_t n1, int64_t k1, int64_t n2, int64_t k2, int64_t a_bits, int64_t a_group_size, int64_t b_bits,
              int64_t b_group_size, OptionalTensor bias) {
  const Caller op("kron_linear", x);
  const int64_t K = check_activations(op, x);
  Linear<kron::Weight> call{};
  call.weight = kron::check_weight(op, {{a, a_scales, a_zeros, a_bits, a_group_size},
                                        {b, b_scales, b_zeros, b_bits, b_group_size},
                                        input_permutation, output_permutation, rank, n1, k1, n2, k2});
  LOWBIT_CHECK(K == call.weight.K, op, ": x must be of shape [..., k1*k2 = ", call.weight.K, "]: got ", shape_of(x));
  const OptionalTensor none;
  check_call(op, bias, {false, none, 0}, call);
  call.batch_invariant = batch_invariant.load(std::memory_order_relaxed);
  const std::vector<int64_t> shape = set_x<Result>(call, x);
  return answer<Result>(op, library().kron_linear, call, x, shape, x.scalar_type(), [&](void* y) { call.y = y; });
}

// w, [N, K] of `dtype`
template <class Result>
Result dequantize(Tensor a, OptionalTensor a_scales, OptionalTensor a_zeros, Tensor b, OptionalTensor b_scales,
                  OptionalTensor b_zeros, OptionalTensor input_permutation, OptionalTensor output_permutation,
                  int64_t rank, int64_t n1, int64_t k1, int64_t n2, int64_t k2, int64_t a_bits, int64_t a_group_size,
                  int64_t b_bits, int64_t b_group_size, ScalarType dtype) {
  const Caller op("kron_dequantize", a);
  const kron::Weight w = kron::check_weight(op, {{a, a_scales, a_zeros, a_bits, a_group_size},
                                                 {b, b_scales, b_zeros, b_bits, b_group_size},
                                                 input_permutation, output_permutation, rank, n1, k1, n2, k2});
  return answer_rows<Result>(op, library().kron_rows, w, nullptr, a, dtype);
}

// w[ids], [..., K] of `dtype`; an id out of range gives a row of NaN.
template <class Result>
Result embedding(Tensor ids, Tensor a, OptionalTensor a_scales, OptionalTensor a_zeros, Tensor b,
                 OptionalTensor b_scales, OptionalTensor b_zeros, OptionalTensor input_permutation,
                 OptionalTensor output_permutation, int64_t rank, int64_t n1, int64_t k1, int64_t n2, int64_t k2,
                 int64_t a_bits, int64_t a_group_size, int64_t b_bits, int64_t b_group_size, ScalarType dtype) {
  const Caller op("kron_embedding", ids);
  const kron::Weight w = kron::check_weight(op, {{a, a_scales, a_zeros, a_bits, a_group_size},
                                                 {b, b_scales, b_zeros, b_bits, b_group_size},
                                                 input_permutation, output_permutation, rank, n1, k1, n2, k2});
  return answer_rows<Result>(op, library().kron_rows, w, &ids, a, dtype);
}

}  // namespace

void register_kron_ops(torch::stable::detail::StableLibrary& m) {
  m.impl("kron_linear", TORCH_BOX(&linear<Tensor>));
  m.impl("kron_linear_declines", TORCH_BOX(&linear<std::string>));
  m.impl("kron_dequantize", TORCH_BOX(&dequantize<Tensor>));
  m.impl("kron_dequantize_declines", TORCH_BOX(&dequantize<std::string>));
  m.impl("kron_embedding", TORCH_BOX(&embedding<Tensor>));
  m.impl("kron_embedding_declines", TORCH_BOX(&embedding<std::string>));
}

}  // namespace cuda
}  // namespace lowbit
