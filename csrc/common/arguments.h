// What the ops of the families with packed codes share on the torch-facing side: the checks of their arguments, and
// the calls of their kernels over threads.
#pragma once
#include <algorithm>
#include <cmath>
#include <optional>
#include <vector>

#include <torch/csrc/stable/ops.h>

#include "checks.h"
#include "empty.h"
#include "invariance.h"
#include "kernel.h"
#include "scratch.h"

namespace lowbit {

using OptionalTensor = std::optional<Tensor>;

constexpr int64_t kTaskElements = 32768;   // rows are converted in tasks of about this many elements
constexpr int64_t kTaskProducts = 131072;  // and multiplied in tasks of about this many products
constexpr int64_t kExpansion = 4;          // expanding a weight costs about as much as this many products

inline int64_t grain(int64_t task, int64_t per_item) {
  return std::max<int64_t>(1, task / std::max<int64_t>(1, per_item));
}

inline void check_codes(const char* op, const Tensor& packed, int64_t min_bits, int64_t bits, int64_t group_size,
                        int64_t K, bool blocks_too, Codes& w) {
  LOWBIT_CHECK(bits >= min_bits && bits <= 8, op, ": bits must be between ", min_bits, " and 8: got bits=", bits);
  LOWBIT_CHECK(K >= 1, op, ": in_features must be at least 1: got ", K);
  LOWBIT_CHECK(group_size >= 1 && group_size <= K, op, ": group_size must be between 1 and K: got group_size=",
               group_size, ", K=", K);
  w.blocks = blocks_too && packed.dim() == 4;
  LOWBIT_CHECK(w.blocks || packed.dim() == 2, op, ": packed must have two dimensions",
               blocks_too ? " (or four: blocks)" : "", ": got shape ", shape_of(packed));
  LOWBIT_CHECK(packed.scalar_type() == ScalarType::Int, op, ": packed must be int32: got ",
               dtype_name(packed.scalar_type()));
  w.N = packed.size(0);
  w.K = K;
  w.group_size = group_size;
  w.G = (K - 1) / group_size + 1;
  w.bits = int(bits);
  const int64_t words = ((K - 1) / 32 + 1) * bits;
  if (w.blocks) {
    LOWBIT_CHECK(packed.size(1) * bits == words && packed.size(2) == bits && packed.size(3) == 1, op,
                 ": packed in blocks must be [N, ", words / bits, ", ", bits, ", 1] for K=", K, ", bits=", bits,
                 ": got shape ", shape_of(packed));
    check_cpu(op, "packed", packed);
    LOWBIT_CHECK(packed.is_contiguous(), op, ": packed must be contiguous");
  } else {
    LOWBIT_CHECK(packed.size(1) == words, op, ": packed must have ceil(K/32)*bits = ", words, " words per row for K=",
                 K, ", bits=", bits, ": got ", packed.size(1));
    check_stored(op, "packed", packed, w.N, words);
  }
  w.packed = static_cast<const uint8_t*>(packed.const_data_ptr());
  w.row_bytes = words * 4;
}

inline Outliers check_outliers(const char* op, const OptionalTensor& outlier_values,
                               const OptionalTensor& outlier_columns, const OptionalTensor& outlier_rows, int64_t N,
                               int64_t K) {
  Outliers o{};
  const bool given = outlier_values.has_value();
  LOWBIT_CHECK(given == outlier_columns.has_value() && given == outlier_rows.has_value(), op,
               ": outlier_values, outlier_columns and outlier_rows must be given together");
  if (!given || outlier_values->numel() == 0) return o;
  const int64_t nnz = outlier_values->numel();
  check_stored(op, "outlier_values", *outlier_values, nnz);
  check_stored(op, "outlier_columns", *outlier_columns, nnz);
  check_stored(op, "outlier_rows", *outlier_rows, N + 1);
  o.dtype = check_float(op, "outlier_values", outlier_values->scalar_type());
  o.values = outlier_values->const_data_ptr();
  const ScalarType columns = outlier_columns->scalar_type();
  LOWBIT_CHECK(columns == ScalarType::Int || (columns == ScalarType::Short && K <= 32768) ||
                   (columns == ScalarType::UInt16 && K <= 65536),
               op, ": outlier_columns must be int16 (K <= 32768), uint16 (K <= 65536) or int32: got ",
               dtype_name(columns), ", K=", K);
  o.wide = columns == ScalarType::Int;
  o.columns = outlier_columns->const_data_ptr();
  LOWBIT_CHECK(outlier_rows->scalar_type() == ScalarType::Int, op, ": outlier_rows must be int32: got ",
               dtype_name(outlier_rows->scalar_type()));
  o.rows = static_cast<const int32_t*>(outlier_rows->const_data_ptr());

  // Row pointers and columns index memory, so their values are checked too.
  bool ordered = o.rows[0] == 0 && o.rows[N] == nnz;
  for (int64_t n = 0; n < N; ++n) ordered &= o.rows[n] <= o.rows[n + 1];
  LOWBIT_CHECK(ordered, op, ": outlier_rows must rise from 0 to the number of outliers (", nnz, ")");
  uint32_t largest = 0;  // read as unsigned, a negative column is a large one
  if (o.wide) {
    const uint32_t* c = static_cast<const uint32_t*>(o.columns);
    for (int64_t i = 0; i < nnz; ++i) largest = std::max(largest, c[i]);
  } else {
    const uint16_t* c = static_cast<const uint16_t*>(o.columns);
    for (int64_t i = 0; i < nnz; ++i) largest = std::max<uint32_t>(largest, c[i]);
  }
  LOWBIT_CHECK(int64_t(largest) < K, op, ": outlier_columns must be between 0 and K - 1: got ",
               o.wide                          ? int64_t(int32_t(largest))
               : columns == ScalarType::UInt16 ? int64_t(largest)
                                               : int64_t(int16_t(largest)),
               ", K=", K);
  const auto column = [&](int64_t i) -> int64_t {
    return o.wide ? static_cast<const int32_t*>(o.columns)[i] : static_cast<const uint16_t*>(o.columns)[i];
  };
  bool rising = true;
  for (int64_t n = 0; n < N; ++n)
    for (int64_t i = o.rows[n] + 1; i < o.rows[n + 1]; ++i) rising &= column(i - 1) < column(i);
  LOWBIT_CHECK(rising, op, ": outlier_columns must increase within each row: they do not");
  return o;
}

// The K of x, [..., K].
inline int64_t check_activations(const char* op, const Tensor& x) {
  check_cpu(op, "x", x);
  LOWBIT_CHECK(x.dim() >= 1, op, ": x must have at least one dimension");
  check_float(op, "x", x.scalar_type());
  return x.size(x.dim() - 1);
}

// y = x @ w.T + bias: what is not said by the weight, already in `a`.
template <class Weight>
Tensor run_linear(const char* op, Linear<Weight>& a, Tensor x, const OptionalTensor& bias, bool int8,
                  const OptionalTensor& x_scale, const CpuKernel<Weight>& kernel) {
  const int64_t N = a.weight.N, K = a.weight.K;
  a.dtype = float_dtype(x.scalar_type());
  if (bias) {
    check_stored(op, "bias", *bias, N);
    a.bias_dtype = check_float(op, "bias", bias->scalar_type());
    a.bias = bias->const_data_ptr();
  }
  a.int8 = int8;
  a.batch_invariant = batch_invariant.load(std::memory_order_relaxed);
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
  shape.push_back(N);
  Tensor y = empty_cpu(shape, x.scalar_type());
  if (a.M == 0 || N == 0) return y;
  if (!x.is_contiguous()) x = torch::stable::contiguous(x);

  // As many rows of x at a time as scratch memory is kept for: memory mapped anew costs more than it holds.
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
    for (int64_t n = n0; n < n1; ++n) kernel.dequantize(w, n, out_dtype, base + n * row_bytes);
  });
  return out;
}

inline void check_ids(const char* op, const Tensor& ids) {
  check_cpu(op, "ids", ids);
  const ScalarType type = ids.scalar_type();
  LOWBIT_CHECK(type == ScalarType::Int || type == ScalarType::Long, op, ": ids must be int32 or int64: got ",
               dtype_name(type));
}

constexpr int64_t kRowsAhead = 4;  // of a gather, are fetched

// Always inlined: GCC takes functions that only prefetch for ones without effect, and leaves out their calls.
inline __attribute__((always_inline)) void prefetch_bytes(const void* first, int64_t bytes) {
  for (int64_t i = 0; i < std::min<int64_t>(bytes, 512); i += 64)
    __builtin_prefetch(static_cast<const char*>(first) + i);
}

// Asks for row n of w; a family that keeps more beside its codes has its own.
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
