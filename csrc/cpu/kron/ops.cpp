#include "cpu/kron/ops.h"

#include <algorithm>
#include <vector>

#include "common/kron_arguments.h"
#include "common/empty.h"
#include "cpu/kron/kernel.h"
#include "cpu/kron/tuning.h"
#include "cpu/run.h"

namespace lowbit {
namespace kron {
// run_embedding() finds it by the type of its argument, so it is not in the unnamed namespace.
inline void prefetch_row(const Weight&, int64_t) {}  // all rows are made of the same factors

namespace {

// Where element (left, right) of a pair of sizes [L, R] stands: in the other order when swapped, then permuted.
// Empty: where it is.
std::vector<int32_t> order_map(int64_t L, int64_t R, bool swapped, const std::vector<int32_t>& inverse) {
  std::vector<int32_t> map;
  swapped &= L > 1 && R > 1;
  if (!swapped && inverse.empty()) return map;
  map.resize(size_t(L * R));
  for (int64_t l = 0; l < L; ++l)
    for (int64_t r = 0; r < R; ++r) {
      const int64_t i = swapped ? r * L + l : l * R + r;
      map[size_t(l * R + r)] = inverse.empty() ? int32_t(i) : inverse[size_t(i)];
    }
  return map;
}

lowbit::CpuKernel<Weight> rows_kernel() {
  lowbit::CpuKernel<Weight> kernel{};
  kernel.dequantize = cpu_kernel(current_isa()).dequantize;
  return kernel;
}

// y[..., n] = sum_k x[..., k] * w[n, k] + bias[n]
Tensor linear_cpu(Tensor x, Tensor a, OptionalTensor a_scales, OptionalTensor a_zeros, Tensor b,
                  OptionalTensor b_scales, OptionalTensor b_zeros, OptionalTensor input_permutation,
                  OptionalTensor output_permutation, int64_t rank, int64_t n1, int64_t k1, int64_t n2, int64_t k2,
                  int64_t a_bits, int64_t a_group_size, int64_t b_bits, int64_t b_group_size, OptionalTensor bias) {
  const char* op = "kron_linear";
  check_device(op, "x", x);
  const DType dtype = check_float(op, "x", x.scalar_type());
  const Checked w = check_weight(op, {{a, a_scales, a_zeros, a_bits, a_group_size},
                                      {b, b_scales, b_zeros, b_bits, b_group_size},
                                      input_permutation, output_permutation, rank, n1, k1, n2, k2});
  LOWBIT_CHECK(x.dim() >= 1 && x.size(x.dim() - 1) == w.K, op, ": x must be of shape [..., k1*k2 = ", w.K, "]: got ",
               shape_of(x));
  Linear call{};
  call.R = rank;
  // Which factor makes the inner loop: the larger, where it has many columns to sum over or the other has few lanes.
  const Isa isa = current_isa();
  const bool all_bf16 = dtype == DType::bf16 && w.a.dtype == DType::bf16 && w.b.dtype == DType::bf16;
  const int64_t dot_columns = all_bf16 && isa == Isa::avx512bf16 ? kDotColumnsBf16 : kDotColumns;
  const bool swapped = n1 * k1 > n2 * k2 && (k1 >= dot_columns || n2 < kFewLanes || k2 < kFewLanes);
  call.left = swapped ? w.b : w.a;
  call.right = swapped ? w.a : w.b;
  const Factor &left = call.left, &right = call.right;
  call.right_first = left.K * right.N * (right.K + left.N) <= left.N * right.K * (left.K + right.N);
  call.dot = right.K >= dot_columns || (call.right_first ? left.K : left.N) < kFewOuterRows;
  const std::vector<int32_t> source = order_map(left.K, right.K, swapped, w.input_inverse);
  const std::vector<int32_t> target = order_map(left.N, right.N, swapped, w.output_inverse);
  call.source = source.empty() ? nullptr : source.data();
  call.target = target.empty() ? nullptr : target.data();
  call.dtype = dtype;
  if (bias) {
    check_stored(op, "bias", *bias, w.N);
    call.bias_dtype = check_float(op, "bias", bias->scalar_type());
    call.bias = bias->const_data_ptr();
  }

  std::vector<int64_t> shape;
  int64_t M = 1;
  for (int64_t d = 0; d + 1 < x.dim(); ++d) {
    shape.push_back(x.size(d));
    M *= x.size(d);
  }
  shape.push_back(w.N);
  Tensor y = empty_cpu(shape, x.scalar_type());
  if (M == 0) return y;
  if (!x.is_contiguous()) x = torch::stable::contiguous(x);

  const int64_t row = call.right_first ? w.K : rank * left.N * right.K;  // of what is shared, per row of x
  const int64_t products = rank * right.K * (call.right_first ? left.K : left.N);
  const int64_t range = std::min(M, grain(kSharedElements, row));
  const CpuKernel& kernel = all_bf16 ? cpu_kernel_all_bf16(isa) : cpu_kernel(isa);
  call.M = range;
  Scratch shared(Slot::prepared, size_t(kernel.shared_bytes(call)));
  kernel.prepare_constants(call, shared.data());
  const char* from = static_cast<const char*>(x.const_data_ptr());
  char* to = static_cast<char*>(y.mutable_data_ptr());
  for (int64_t m = 0; m < M; m += range) {
    call.M = std::min(range, M - m);
    call.x = from + m * w.K * element_size(dtype);
    call.y = to + m * w.N * element_size(dtype);
    torch::stable::parallel_for(0, call.M, grain(kTaskElements, std::max(w.K, row)), [&](int64_t m0, int64_t m1) {
      kernel.prepare(call, shared.data(), m0, m1);
    });
    const int64_t tasks = kernel.tasks(call), per_task = right.N * (products * call.M + kExpansion * right.K) / tasks;
    torch::stable::parallel_for(0, tasks, grain(kTaskProducts, per_task), [&](int64_t t0, int64_t t1) {
      kernel.linear(call, shared.data(), t0, t1);
    });
  }
  return y;
}

// w, [N, K] of `dtype`
Tensor dequantize_cpu(Tensor a, OptionalTensor a_scales, OptionalTensor a_zeros, Tensor b, OptionalTensor b_scales,
                      OptionalTensor b_zeros, OptionalTensor input_permutation, OptionalTensor output_permutation,
                      int64_t rank, int64_t n1, int64_t k1, int64_t n2, int64_t k2, int64_t a_bits,
                      int64_t a_group_size, int64_t b_bits, int64_t b_group_size, ScalarType dtype) {
  const char* op = "kron_dequantize";
  const Weight w = check_weight(op, {{a, a_scales, a_zeros, a_bits, a_group_size},
                                     {b, b_scales, b_zeros, b_bits, b_group_size},
                                     input_permutation, output_permutation, rank, n1, k1, n2, k2});
  return run_dequantize(op, w, dtype, rows_kernel());
}

// w[ids], [..., K] of `dtype`
Tensor embedding_cpu(Tensor ids, Tensor a, OptionalTensor a_scales, OptionalTensor a_zeros, Tensor b,
                     OptionalTensor b_scales, OptionalTensor b_zeros, OptionalTensor input_permutation,
                     OptionalTensor output_permutation, int64_t rank, int64_t n1, int64_t k1, int64_t n2, int64_t k2,
                     int64_t a_bits, int64_t a_group_size, int64_t b_bits, int64_t b_group_size, ScalarType dtype) {
  const char* op = "kron_embedding";
  check_ids(op, ids);
  const Weight w = check_weight(op, {{a, a_scales, a_zeros, a_bits, a_group_size},
                                     {b, b_scales, b_zeros, b_bits, b_group_size},
                                     input_permutation, output_permutation, rank, n1, k1, n2, k2});
  return run_embedding(op, w, ids, dtype, rows_kernel());
}

}  // namespace

void register_ops(torch::stable::detail::StableLibrary& m) {
  m.impl("kron_linear", TORCH_BOX(&linear_cpu));
  m.impl("kron_dequantize", TORCH_BOX(&dequantize_cpu));
  m.impl("kron_embedding", TORCH_BOX(&embedding_cpu));
}

}  // namespace kron
}  // namespace lowbit
