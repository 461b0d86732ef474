#include "cuda/ops/codebook.h"

#include "common/codebook_arguments.h"
#include "cpu/invariance.h"
#include "cuda/ops/library.h"

namespace lowbit {
namespace cuda {
namespace {

// y[..., n] = sum_k x[..., k] * w[n, k] + bias[n]
template <class Result>
Result linear(Tensor x, Tensor packed, OptionalTensor outlier_values, OptionalTensor outlier_columns,
              OptionalTensor outlier_rows, Tensor codebook, OptionalTensor scales, OptionalTensor scale_codebook,
              OptionalTensor scale_absmax, OptionalTensor scale_offset, int64_t bits, int64_t group_size,
              int64_t layout, OptionalTensor bias, OptionalTensor x_scale, bool int8) {
  const Caller op("codebook_linear", x);
  const int64_t K = check_activations(op, x);
  Linear<codebook::Weight> call{};
  call.weight = codebook::check_weight(op, {packed, codebook, scales, {scale_codebook, scale_absmax, scale_offset},
                                            {outlier_values, outlier_columns, outlier_rows}, bits, group_size, layout,
                                            K});
  check_call(op, bias, {int8, x_scale, /*x_group=*/0}, call);
  call.batch_invariant = batch_invariant.load(std::memory_order_relaxed);
  const std::vector<int64_t> shape = set_x<Result>(call, x);
  return answer<Result>(op, library().codebook_linear, call, x, shape, x.scalar_type(), [&](void* y) { call.y = y; });
}

// y[i, n] = sum_k x[i / r, k] * w[ids[i], n, k] + bias[ids[i], n]; an id of num_experts or more gives zeros, a negative
// one NaN.
template <class Result>
Result experts(Tensor x, Tensor ids, Tensor packed, OptionalTensor outlier_values, OptionalTensor outlier_columns,
               OptionalTensor outlier_rows, Tensor codebook, OptionalTensor scales, OptionalTensor scale_codebook,
               OptionalTensor scale_absmax, OptionalTensor scale_offset, int64_t bits, int64_t group_size,
               int64_t layout, int64_t num_experts, OptionalTensor bias, OptionalTensor x_scale, bool int8) {
  const Caller op("codebook_experts", x);
  const int64_t K = check_activations(op, x);
  Experts<codebook::Weight> call{};
  call.linear.weight = codebook::check_weight(
      op, {packed, codebook, scales, {scale_codebook, scale_absmax, scale_offset},
           {outlier_values, outlier_columns, outlier_rows}, bits, group_size, layout, K});
  check_call(op, bias, {int8, x_scale, /*x_group=*/0}, call.linear);
  call.linear.batch_invariant = batch_invariant.load(std::memory_order_relaxed);
  const std::vector<int64_t> shape = set_ids<Result>(op, call, x, ids, num_experts);
  return answer<Result>(op, library().codebook_experts, call, x, shape, x.scalar_type(),
                        [&](void* y) { call.linear.y = y; });
}

// w, [N, K] of `dtype`
template <class Result>
Result dequantize(Tensor packed, OptionalTensor outlier_values, OptionalTensor outlier_columns,
                  OptionalTensor outlier_rows, Tensor codebook, OptionalTensor scales, OptionalTensor scale_codebook,
                  OptionalTensor scale_absmax, OptionalTensor scale_offset, int64_t bits, int64_t group_size,
                  int64_t layout, int64_t in_features, ScalarType dtype) {
  const Caller op("codebook_dequantize", packed);
  const codebook::Weight w =
      codebook::check_weight(op, {packed, codebook, scales, {scale_codebook, scale_absmax, scale_offset},
                                  {outlier_values, outlier_columns, outlier_rows}, bits, group_size, layout,
                                  in_features});
  return answer_rows<Result>(op, library().codebook_rows, w, nullptr, packed, dtype);
}

// w[ids], [..., K] of `dtype`; an id out of range gives a row of NaN.
template <class Result>
Result embedding(Tensor ids, Tensor packed, OptionalTensor outlier_values, OptionalTensor outlier_columns,
                 OptionalTensor outlier_rows, Tensor codebook, OptionalTensor scales, OptionalTensor scale_codebook,
                 OptionalTensor scale_absmax, OptionalTensor scale_offset, int64_t bits, int64_t group_size,
                 int64_t layout, int64_t in_features, ScalarType dtype) {
  const Caller op("codebook_embedding", ids);
  const codebook::Weight w =
      codebook::check_weight(op, {packed, codebook, scales, {scale_codebook, scale_absmax, scale_offset},
                                  {outlier_values, outlier_columns, outlier_rows}, bits, group_size, layout,
                                  in_features});
  return answer_rows<Result>(op, library().codebook_rows, w, &ids, packed, dtype);
}

}  // namespace

void register_codebook_ops(torch::stable::detail::StableLibrary& m) {
  m.impl("codebook_linear", TORCH_BOX(&linear<Tensor>));
  m.impl("codebook_linear_declines", TORCH_BOX(&linear<std::string>));
  m.impl("codebook_experts", TORCH_BOX(&experts<Tensor>));
  m.impl("codebook_experts_declines", TORCH_BOX(&experts<std::string>));
  m.impl("codebook_dequantize", TORCH_BOX(&dequantize<Tensor>));
  m.impl("codebook_dequantize_declines", TORCH_BOX(&dequantize<std::string>));
  m.impl("codebook_embedding", TORCH_BOX(&embedding<Tensor>));
  m.impl("codebook_embedding_declines", TORCH_BOX(&embedding<std::string>));
}

}  // namespace cuda
}  // namespace lowbit
