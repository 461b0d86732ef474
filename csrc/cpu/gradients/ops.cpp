#include "cpu/gradients/ops.h"

#include <vector>

#include <torch/csrc/stable/ops.h>

#include "common/arguments.h"
#include "common/empty.h"
#include "cpu/gradients/kernel.h"
#include "cpu/run.h"
#include "cpu/scratch.h"
#include "cpu/tuning.h"

namespace lowbit {
namespace gradients {
namespace {

Columns check_rows(const char* op, const char* name, Tensor& t) {
  check_device(op, name, t);
  LOWBIT_CHECK(t.dim() == 2, op, ": ", name, " must have two dimensions: got shape ", shape_of(t));
  const DType dtype = check_float(op, name, t.scalar_type());
  if (!t.is_contiguous()) t = torch::stable::contiguous(t);
  return {t.const_data_ptr(), dtype, t.size(1)};
}

const float* check_floats(const char* op, const char* name, const Tensor& t, int64_t rows, int64_t columns) {
  check_stored(op, name, t, rows, columns);
  LOWBIT_CHECK(t.scalar_type() == ScalarType::Float, op, ": ", name, " must be float32: got ",
               dtype_name(t.scalar_type()));
  return static_cast<const float*>(t.const_data_ptr());
}

}  // namespace

Tensor sums_by_code_cpu(OptionalTensor d, Tensor packed, OptionalTensor scales, int64_t bits, int64_t in_features,
                        int64_t group_size, bool grouped) {
  const char* op = "sums_by_code";
  const int64_t K = in_features;
  ByCode a{};
  check_codes(op, packed, 1, bits, group_size, kCanonicalLayout, K, /*blocks_too=*/false, a.codes);
  const Codes& w = a.codes;
  LOWBIT_CHECK(d || !scales, op, ": scales are for d: got scales without it");
  if (d) a.d = check_floats(op, "d", *d, w.N, K);
  if (scales) a.scales = check_floats(op, "scales", *scales, w.N, w.G);
  a.grouped = grouped;
  Tensor sums = empty_cpu({w.N, grouped ? w.G : 1, int64_t(1) << bits}, ScalarType::Float);
  a.sums = static_cast<float*>(sums.mutable_data_ptr());
  const CpuKernel& kernel = cpu_kernel(current_isa());
  torch::stable::parallel_for(0, w.N, grain(kTaskElements, K),
                              [&](int64_t n0, int64_t n1) { kernel.sums_by_code(a, n0, n1); });
  return sums;
}

Tensor sampled_products_cpu(Tensor dy, Tensor x, Tensor outlier_values, Tensor outlier_columns, Tensor outlier_rows) {
  const char* op = "sampled_products";
  Sampled a{};
  a.dy = check_rows(op, "dy", dy);
  a.x = check_rows(op, "x", x);
  LOWBIT_CHECK(dy.size(0) == x.size(0), op, ": dy and x must have as many rows: got shapes ", shape_of(dy), " and ",
               shape_of(x));
  const int64_t M = x.size(0), N = dy.size(1), K = x.size(1), nnz = outlier_values.numel();
  const OptionalTensor values = outlier_values, columns = outlier_columns, rows = outlier_rows;
  a.outliers = check_outliers(op, {values, columns, rows}, N, K);
  Tensor sums = empty_cpu({nnz}, ScalarType::Float);
  if (nnz == 0) return sums;
  a.sums = static_cast<float*>(sums.mutable_data_ptr());
  std::fill(a.sums, a.sums + nnz, 0.0f);
  const CpuKernel& kernel = cpu_kernel(current_isa());
  Scratch scratch(Slot::prepared, size_t(K * kRowsTogether) * sizeof(float));
  float* x_columns = static_cast<float*>(scratch.data());
  a.x_columns = x_columns;
  const int64_t of_x = (K - 1) / kTile + 1, of_rows = (N - 1) / kTile + 1, tile = kTile * kRowsTogether;
  for (a.m0 = 0; a.m0 < M; a.m0 = a.m1) {
    a.m1 = std::min(M, a.m0 + kRowsTogether);
    torch::stable::parallel_for(0, of_x, grain(kTaskElements, tile), [&](int64_t t0, int64_t t1) {
      kernel.turn(a.x, a.m0, a.m1, t0 * kTile, std::min(K, t1 * kTile), x_columns + t0 * tile);
    });
    torch::stable::parallel_for(0, of_rows, grain(kTaskElements, tile), [&](int64_t t0, int64_t t1) {
      kernel.sampled_products(a, t0 * kTile, std::min(N, t1 * kTile));
    });
  }
  return sums;
}

}  // namespace gradients
}  // namespace lowbit
