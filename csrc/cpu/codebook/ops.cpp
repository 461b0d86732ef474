#include "cpu/codebook/ops.h"

#include "common/codebook_arguments.h"
#include "cpu/codebook/kernel.h"
#include "cpu/codebook/stack.h"
#include "cpu/experts.h"

namespace lowbit {
namespace codebook {

// run_embedding() finds it by the type of its argument, so it is not in the unnamed namespace.
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

// y[..., n] = sum_k x[..., k] * w[n, k] + bias[n]
Tensor linear_cpu(Tensor x, Tensor packed, OptionalTensor outlier_values, OptionalTensor outlier_columns,
                  OptionalTensor outlier_rows, Tensor codebook, OptionalTensor scales, OptionalTensor scale_codebook,
                  OptionalTensor scale_absmax, OptionalTensor scale_offset, int64_t bits, int64_t group_size,
                  int64_t layout, OptionalTensor bias, OptionalTensor x_scale, bool int8) {
  const char* op = "codebook_linear";
  const int64_t K = check_activations(op, x);
  Linear a{};
  a.weight = check_weight(op, {packed, codebook, scales, {scale_codebook, scale_absmax, scale_offset},
                               {outlier_values, outlier_columns, outlier_rows}, bits, group_size, layout, K});
  check_call(op, bias, {int8, x_scale, /*x_group=*/0}, a);
  return run_linear(a, x, cpu_kernel(current_isa()));
}

// y[i] = x[i / repeats] @ w[ids[i]].T + bias[ids[i]]
Tensor experts_cpu(Tensor x, Tensor ids, Tensor packed, OptionalTensor outlier_values, OptionalTensor outlier_columns,
                   OptionalTensor outlier_rows, Tensor codebook, OptionalTensor scales, OptionalTensor scale_codebook,
                   OptionalTensor scale_absmax, OptionalTensor scale_offset, int64_t bits, int64_t group_size,
                   int64_t layout, int64_t num_experts, OptionalTensor bias, OptionalTensor x_scale, bool int8) {
  const char* op = "codebook_experts";
  const int64_t K = check_activations(op, x);
  Linear a{};
  a.weight = check_weight(op, {packed, codebook, scales, {scale_codebook, scale_absmax, scale_offset},
                               {outlier_values, outlier_columns, outlier_rows}, bits, group_size, layout, K});
  check_call(op, bias, {int8, x_scale, /*x_group=*/0}, a);
  return run_experts(op, a, x, ids, num_experts, cpu_kernel(current_isa()));
}

// w, [N, K] of `dtype`
Tensor dequantize_cpu(Tensor packed, OptionalTensor outlier_values, OptionalTensor outlier_columns,
                      OptionalTensor outlier_rows, Tensor codebook, OptionalTensor scales,
                      OptionalTensor scale_codebook, OptionalTensor scale_absmax, OptionalTensor scale_offset,
                      int64_t bits, int64_t group_size, int64_t layout, int64_t in_features, ScalarType dtype) {
  const char* op = "codebook_dequantize";
  const Weight w = check_weight(op, {packed, codebook, scales, {scale_codebook, scale_absmax, scale_offset},
                                     {outlier_values, outlier_columns, outlier_rows}, bits, group_size, layout,
                                     in_features});
  return run_dequantize(op, w, dtype, cpu_kernel(current_isa()));
}

// w[ids], [..., K] of `dtype`
Tensor embedding_cpu(Tensor ids, Tensor packed, OptionalTensor outlier_values, OptionalTensor outlier_columns,
                     OptionalTensor outlier_rows, Tensor codebook, OptionalTensor scales, OptionalTensor scale_codebook,
                     OptionalTensor scale_absmax, OptionalTensor scale_offset, int64_t bits, int64_t group_size,
                     int64_t layout, int64_t in_features, ScalarType dtype) {
  const char* op = "codebook_embedding";
  check_ids(op, ids);
  const Weight w = check_weight(op, {packed, codebook, scales, {scale_codebook, scale_absmax, scale_offset},
                                     {outlier_values, outlier_columns, outlier_rows}, bits, group_size, layout,
                                     in_features});
  return run_embedding(op, w, ids, dtype, cpu_kernel(current_isa()));
}

}  // namespace

void register_ops(torch::stable::detail::StableLibrary& m) {
  m.impl("codebook_linear", TORCH_BOX(&linear_cpu));
  m.impl("codebook_experts", TORCH_BOX(&experts_cpu));
  m.impl("codebook_dequantize", TORCH_BOX(&dequantize_cpu));
  m.impl("codebook_embedding", TORCH_BOX(&embedding_cpu));
}

}  // namespace codebook
}  // namespace lowbit
