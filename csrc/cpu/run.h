// How the ops of every family call their kernels: the tasks that threads share out, and the memory that calls need.
#pragma once
#include <algorithm>
#include <vector>

#include <torch/csrc/stable/ops.h>

#include "common/arguments.h"
#include "common/empty.h"
#include "cpu/invariance.h"
#include "cpu/kernel.h"
#include "cpu/scratch.h"
#include "cpu/tuning.h"

namespace lowbit {

inline int64_t grain(int64_t task, int64_t per_item) {
  return std::max<int64_t>(1, task / std::max<int64_t>(1, per_item));
}

// y = x @ w.T + bias; `a` says all but x and y.
template <class Weight>
Tensor run_linear(Linear<Weight>& a, Tensor x, const CpuKernel<Weight>& kernel) {
  const int64_t N = a.weight.N, K = a.weight.K;
  a.dtype = float_dtype(x.scalar_type());
  a.batch_invariant = batch_invariant.load(std::memory_order_relaxed);
  std::vector<int64_t> shape;
  a.M = 1;
  for (int64_t d = 0; d + 1 < x.dim(); ++d) {
    shape.push_back(x.size(d));
    a.M *= x.size(d);
  }
  shape.push_back(N);
  Tensor y = empty_cpu(shape, x.scalar_type());
  if (a.M == 0 || N == 0) return y;
  if (!x.is_contiguous()) x = torch::stable::contiguous(x);

  // As many rows of x at a time as fit the scratch memory that threads keep: mapping new memory costs more.
  const int64_t M = a.M, size = element_size(a.dtype), bytes = kernel.prepared_bytes(a);
  const int64_t fitting = int64_t(double(kScratchKept) / double(std::max<int64_t>(1, bytes)) * double(M));
  const int64_t most = std::max<int64_t>(1, fitting / kPassRows) * kPassRows;
  for (int64_t m = 0; m < M; m += most) {
    a.M = std::min(most, M - m);
    a.x = static_cast<const char*>(x.const_data_ptr()) + m * K * size;
    a.y = static_cast<char*>(y.mutable_data_ptr()) + m * N * size;
    Scratch prepared(Slot::prepared, size_t(kernel.prepared_bytes(a)));
    torch::stable::parallel_for(0, a.M, grain(kTaskElements, K), [&](int64_t m0, int64_t m1) {
      kernel.prepare(a, prepared.data(), m0, m1);
    });
    const int64_t rows = kernel.row_tile, tiles = (N - 1) / rows + 1;
    torch::stable::parallel_for(
        0, tiles, grain(kTaskProducts, rows * K * (a.M + kExpansion)), [&](int64_t t0, int64_t t1) {
          kernel.linear(a, prepared.data(), t0 * rows, std::min(t1 * rows, N));
        });
  }
  return y;
}

// out = the rows [n0, n1) of w. A family that has a faster way for many rows overloads it.
template <class Weight>
void dequantize_rows(const Weight& w, int64_t n0, int64_t n1, DType dtype, const CpuKernel<Weight>& kernel, char* out) {
  for (int64_t n = n0; n < n1; ++n, out += w.K * element_size(dtype)) kernel.dequantize(w, n, dtype, out);
}

// w, [N, K] of `dtype`
template <class Weight>
Tensor run_dequantize(const char* op, const Weight& w, ScalarType dtype,
                      const CpuKernel<Weight>& kernel) {
  const DType out_dtype = check_float(op, "dtype", dtype);
  const std::vector<int64_t> shape{w.N, w.K};
  Tensor out = empty_cpu(shape, dtype);
  char* base = static_cast<char*>(out.mutable_data_ptr());
  const int64_t row_bytes = w.K * element_size(out_dtype);
  torch::stable::parallel_for(0, w.N, grain(kTaskElements, w.K), [&](int64_t n0, int64_t n1) {
    dequantize_rows(w, n0, n1, out_dtype, kernel, base + n0 * row_bytes);
  });
  return out;
}

// Always inlined: GCC 12 drops calls of functions that only prefetch, as calls without effect.
inline __attribute__((always_inline)) void prefetch_bytes(const void* first, int64_t bytes) {
  for (int64_t i = 0; i < std::min(bytes, kRowBytesAhead); i += 64)
    __builtin_prefetch(static_cast<const char*>(first) + i);
}

// Fetches row n of w. A family that stores more than codes overloads it.
inline __attribute__((always_inline)) void prefetch_row(const Codes& w, int64_t n) {
  prefetch_bytes(w.packed + n * w.row_bytes, w.row_bytes);
}

// w[ids], [..., K] of `dtype`
template <class Weight>
Tensor run_embedding(const char* op, const Weight& w, Tensor ids, ScalarType dtype,
                     const CpuKernel<Weight>& kernel) {
  const DType out_dtype = check_float(op, "dtype", dtype);
  std::vector<int64_t> shape;
  for (int64_t d = 0; d < ids.dim(); ++d) shape.push_back(ids.size(d));
  shape.push_back(w.K);
  Tensor out = empty_cpu(shape, dtype);
  if (!ids.is_contiguous()) ids = torch::stable::contiguous(ids);
  const void* data = ids.const_data_ptr();
  const bool narrow = ids.scalar_type() == ScalarType::Int;
  const auto id = [&](int64_t i) -> int64_t {
    return narrow ? static_cast<const int32_t*>(data)[i] : static_cast<const int64_t*>(data)[i];
  };
  const int64_t count = ids.numel();
  for (int64_t i = 0; i < count; ++i)
    LOWBIT_CHECK(id(i) >= 0 && id(i) < w.N, op, ": ids must be in [0, ", w.N, ") (num_embeddings=", w.N,
                 "): got ", id(i));
  char* base = static_cast<char*>(out.mutable_data_ptr());
  const int64_t row_bytes = w.K * element_size(out_dtype);
  torch::stable::parallel_for(0, count, grain(kTaskElements, w.K), [&](int64_t i0, int64_t i1) {
    for (int64_t i = i0; i < i1; ++i) {
      if (i + kRowsAhead < i1) prefetch_row(w, id(i + kRowsAhead));
      kernel.dequantize(w, id(i), out_dtype, base + i * row_bytes);
    }
  });
  return out;
}

}  // namespace lowbit
