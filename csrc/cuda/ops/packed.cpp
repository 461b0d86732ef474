#include "cuda/ops/packed.h"

#include "common/packed_arguments.h"
#include "cpu/invariance.h"
#include "cuda/ops/library.h"

namespace lowbit {
namespace cuda {
namespace {

// Why no kernel here reads a weight, or null.
const char* why_not(const Tensor& scales, const OptionalTensor& zeros, bool minimum,
                    const OptionalTensor& scale_factors, int64_t scale_block) {
  if (minimum) return "they read no minima";
  if (zeros && zeros->dim() == 2 && scales.dim() == 2 && zeros->size(1) < scales.size(1))
    return "they read no zeros that are packed";
  return scale_factors || scale_block ? "they read no scales of two levels" : nullptr;
}

// y[..., n] = sum_k x[..., k] * w[n, k] + bias[n]
template <class Result>
Result linear(Tensor x, Tensor packed, OptionalTensor outlier_values, OptionalTensor outlier_columns,
              OptionalTensor outlier_rows, Tensor scales, OptionalTensor zeros, OptionalTensor scale_factors,
              OptionalTensor, int64_t bits, int64_t group_size, int64_t layout, bool minimum, int64_t scale_block,
              OptionalTensor bias, OptionalTensor x_scale, bool int8, int64_t x_group) {
  const Caller op("packed_linear", x);
  if (const char* why = why_not(scales, zeros, minimum, scale_factors, scale_block)) return declined<Result>(op, why);
  const int64_t K = check_activations(op, x);
  const ActivationArguments activations{int8, x_scale, x_group};
  Linear<packed::Weight> call{};
  call.weight = packed::check_weight(op, {packed, scales, zeros, {outlier_values, outlier_columns, outlier_rows},
                                          bits, group_size, layout, K});
  packed::check_x_group(op, activations, call.weight);
  check_call(op, bias, activations, call);
  call.batch_invariant = batch_invariant.load(std::memory_order_relaxed);
  const std::vector<int64_t> shape = set_x<Result>(call, x);
  return answer<Result>(op, library().packed_linear, call, x, shape, x.scalar_type(), [&](void* y) { call.y = y; });
}

// y[i, n] = sum_k x[i / r, k] * w[ids[i], n, k] + bias[ids[i], n]; an id of num_experts or more gives zeros, a negative
// one NaN.
template <class Result>
Result experts(Tensor x, Tensor ids, Tensor packed, OptionalTensor outlier_values, OptionalTensor outlier_columns,
               OptionalTensor outlier_rows, Tensor scales, OptionalTensor zeros, OptionalTensor scale_factors,
               OptionalTensor, int64_t bits, int64_t group_size, int64_t layout, bool minimum, int64_t scale_block,
               int64_t num_experts, OptionalTensor bias, OptionalTensor x_scale, bool int8, int64_t x_group) {
  const Caller op("packed_experts", x);
  if (const char* why = why_not(scales, zeros, minimum, scale_factors, scale_block)) return declined<Result>(op, why);
  const int64_t K = check_activations(op, x);
  const ActivationArguments activations{int8, x_scale, x_group};
  Experts<packed::Weight> call{};
  call.linear.weight = packed::check_weight(op, {packed, scales, zeros, {outlier_values, outlier_columns, outlier_rows},
                                                 bits, group_size, layout, K});
  packed::check_x_group(op, activations, call.linear.weight);
  check_call(op, bias, activations, call.linear);
  call.linear.batch_invariant = batch_invariant.load(std::memory_order_relaxed);
  const std::vector<int64_t> shape = set_ids<Result>(op, call, x, ids, num_experts);
  return answer<Result>(op, library().packed_experts, call, x, shape, x.scalar_type(),
                        [&](void* y) { call.linear.y = y; });
}

// w, [N, K] of `dtype`
template <class Result>
Result dequantize(Tensor packed, OptionalTensor outlier_values, OptionalTensor outlier_columns,
                  OptionalTensor outlier_rows, Tensor scales, OptionalTensor zeros, OptionalTensor scale_factors,
                  OptionalTensor, int64_t bits, int64_t group_size, int64_t layout, bool minimum, int64_t scale_block,
                  int64_t in_features, ScalarType dtype) {
  const Caller op("packed_dequantize", packed);
  if (const char* why = why_not(scales, zeros, minimum, scale_factors, scale_block)) return declined<Result>(op, why);
  const packed::Weight w =
      packed::check_weight(op, {packed, scales, zeros, {outlier_values, outlier_columns, outlier_rows}, bits,
                                group_size, layout, in_features});
  return answer_rows<Result>(op, library().packed_rows, w, nullptr, packed, dtype);
}

// w[ids], [..., K] of `dtype`; an id out of range gives a row of NaN.
template <class Result>
Result embedding(Tensor ids, Tensor packed, OptionalTensor outlier_values, OptionalTensor outlier_columns,
                 OptionalTensor outlier_rows, Tensor scales, OptionalTensor zeros, OptionalTensor scale_factors,
                 OptionalTensor, int64_t bits, int64_t group_size, int64_t layout, bool minimum, int64_t scale_block,
                 int64_t in_features, ScalarType dtype) {
  const Caller op("packed_embedding", ids);
  if (const char* why = why_not(scales, zeros, minimum, scale_factors, scale_block)) return declined<Result>(op, why);
  const packed::Weight w =
      packed::check_weight(op, {packed, scales, zeros, {outlier_values, outlier_columns, outlier_rows}, bits,
                                group_size, layout, in_features});
  return answer_rows<Result>(op, library().packed_rows, w, &ids, packed, dtype);
}

}  // namespace

void register_packed_ops(torch::stable::detail::StableLibrary& m) {
  m.impl("packed_linear", TORCH_BOX(&linear<Tensor>));
  m.impl("packed_linear_declines", TORCH_BOX(&linear<std::string>));
  m.impl("packed_experts", TORCH_BOX(&experts<Tensor>));
  m.impl("packed_experts_declines", TORCH_BOX(&experts<std::string>));
  m.impl("packed_dequantize", TORCH_BOX(&dequantize<Tensor>));
  m.impl("packed_dequantize_declines", TORCH_BOX(&dequantize<std::string>));
  m.impl("packed_embedding", TORCH_BOX(&embedding<Tensor>));
  m.impl("packed_embedding_declines", TORCH_BOX(&embedding<std::string>));
}

}  // namespace cuda
}  // namespace lowbit
