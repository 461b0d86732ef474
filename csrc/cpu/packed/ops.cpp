#include "cpu/packed/ops.h"

#include "cpu/experts.h"
#include "cpu/packed/arguments.h"
#include "cpu/packed/blocks/kernel.h"
#include "cpu/packed/kernel.h"
#include "cpu/packed/stack.h"

namespace lowbit {
namespace packed {

// run_embedding() finds it by the type of its argument, so it is not in the unnamed namespace.
inline __attribute__((always_inline)) void prefetch_row(const CpuWeight& w, int64_t n) {
  lowbit::prefetch_row(static_cast<const Codes&>(w), n);
  if (w.per_tensor) return;
  const auto row = [&](const void* values, DType dtype, int64_t stride) __attribute__((always_inline)) {
    const int64_t size = element_size(dtype);
    prefetch_bytes(static_cast<const char*>(values) + n * stride * size, stride * size);
  };
  row(w.scales, w.scales_dtype, w.scales_row);
  if (w.zeros) row(w.zeros, w.zeros_dtype, w.zeros_row);
  if (w.scale_block) row(w.scale_factors, w.factors_dtype, w.factors_row);
  if (w.zero_factors) row(w.zero_factors, w.factors_dtype, w.factors_row);
}

// As prefetch_row().
inline void dequantize_rows(const CpuWeight& w, int64_t n0, int64_t n1, DType dtype, const CpuKernel&, char* out) {
  blocks::cpu_kernel(current_isa()).dequantize(w, n0, n1, dtype, out);
}

namespace {

// y[..., n] = sum_k x[..., k] * w[n, k] + bias[n]
Tensor linear_cpu(Tensor x, Tensor packed, OptionalTensor outlier_values, OptionalTensor outlier_columns,
                  OptionalTensor outlier_rows, Tensor scales, OptionalTensor zeros, OptionalTensor scale_factors,
                  OptionalTensor zero_factors, int64_t bits, int64_t group_size, int64_t layout, bool minimum,
                  int64_t scale_block, OptionalTensor bias, OptionalTensor x_scale, bool int8, int64_t x_group) {
  const char* op = "packed_linear";
  const int64_t K = check_activations(op, x);
  const ActivationArguments activations{int8, x_scale, x_group};
  Linear a{};
  a.weight = check_cpu_weight(
      op, {packed, scales, zeros, {outlier_values, outlier_columns, outlier_rows}, bits, group_size, layout, K},
      {scale_factors, zero_factors, minimum, scale_block});
  check_x_group(op, activations, a.weight);
  check_call(op, bias, activations, a);
  return run_linear(a, x, cpu_kernel(current_isa()));
}

// y[i] = x[i / repeats] @ w[ids[i]].T + bias[ids[i]]
Tensor experts_cpu(Tensor x, Tensor ids, Tensor packed, OptionalTensor outlier_values, OptionalTensor outlier_columns,
                   OptionalTensor outlier_rows, Tensor scales, OptionalTensor zeros, OptionalTensor scale_factors,
                   OptionalTensor zero_factors, int64_t bits, int64_t group_size, int64_t layout, bool minimum,
                   int64_t scale_block, int64_t num_experts, OptionalTensor bias, OptionalTensor x_scale, bool int8,
                   int64_t x_group) {
  const char* op = "packed_experts";
  const int64_t K = check_activations(op, x);
  const ActivationArguments activations{int8, x_scale, x_group};
  Linear a{};
  a.weight = check_cpu_weight(
      op, {packed, scales, zeros, {outlier_values, outlier_columns, outlier_rows}, bits, group_size, layout, K},
      {scale_factors, zero_factors, minimum, scale_block});
  check_x_group(op, activations, a.weight);
  check_call(op, bias, activations, a);
  return run_experts(op, a, x, ids, num_experts, cpu_kernel(current_isa()));
}

// w, [N, K] of `dtype`
Tensor dequantize_cpu(Tensor packed, OptionalTensor outlier_values, OptionalTensor outlier_columns,
                      OptionalTensor outlier_rows, Tensor scales, OptionalTensor zeros, OptionalTensor scale_factors,
                      OptionalTensor zero_factors, int64_t bits, int64_t group_size, int64_t layout, bool minimum,
                      int64_t scale_block, int64_t in_features, ScalarType dtype) {
  const char* op = "packed_dequantize";
  const CpuWeight w = check_cpu_weight(
      op, {packed, scales, zeros, {outlier_values, outlier_columns, outlier_rows}, bits, group_size, layout, in_features},
      {scale_factors, zero_factors, minimum, scale_block});
  return run_dequantize(op, w, dtype, cpu_kernel(current_isa()));
}

// w[ids], [..., K] of `dtype`
Tensor embedding_cpu(Tensor ids, Tensor packed, OptionalTensor outlier_values, OptionalTensor outlier_columns,
                     OptionalTensor outlier_rows, Tensor scales, OptionalTensor zeros, OptionalTensor scale_factors,
                     OptionalTensor zero_factors, int64_t bits, int64_t group_size, int64_t layout, bool minimum,
                     int64_t scale_block, int64_t in_features, ScalarType dtype) {
  const char* op = "packed_embedding";
  check_ids(op, ids);
  const CpuWeight w = check_cpu_weight(
      op, {packed, scales, zeros, {outlier_values, outlier_columns, outlier_rows}, bits, group_size, layout, in_features},
      {scale_factors, zero_factors, minimum, scale_block});
  return run_embedding(op, w, ids, dtype, cpu_kernel(current_isa()));
}

}  // namespace

void register_ops(torch::stable::detail::StableLibrary& m) {
  m.impl("packed_linear", TORCH_BOX(&linear_cpu));
  m.impl("packed_experts", TORCH_BOX(&experts_cpu));
  m.impl("packed_dequantize", TORCH_BOX(&dequantize_cpu));
  m.impl("packed_embedding", TORCH_BOX(&embedding_cpu));
}

}  // namespace packed
}  // namespace lowbit
