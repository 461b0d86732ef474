// CPU kernels of gradients of a weight's tensors: raw pointers, no torch. What they give never depends on the threads.
#pragma once
#include "common/operands.h"
#include "cpu/kernel.h"

namespace lowbit {
namespace gradients {

// sums[n, t, c] = the sum of d[n, k] * scales[n, k / group_size] over the columns k of table t whose code is c; without
// d and scales, how many columns these are
struct ByCode {
  Codes codes;          // of `d`; canonical
  const float* d;       // [N, K]; null: all are 1
  const float* scales;  // [N, G]; null: all are 1
  bool grouped;         // a table for each group; else one for a row
  float* sums;          // [N, G or 1, 1 << bits]
};

// A part of rows of a matrix, the rows side by side: column c of it is [step] floats
struct Columns {
  const void* from;  // [M, width], contiguous
  DType dtype;
  int64_t width;
};

// sums[j] += the sum over m0 <= m < m1 of dy[m, row of j] * x[m, column of j], for every outlier j
struct Sampled {
  Columns dy, x;
  Outliers outliers;
  int64_t m0, m1;
  const float* x_columns;  // [K, kRowsTogether]: those of x, as `turn` makes them
  float* sums;             // [nnz]
};

struct CpuKernel {
  void (*sums_by_code)(const ByCode&, int64_t n0, int64_t n1);
  // to[c - c0] = the rows m0 <= m < m1 of column c, for c0 <= c < c1; zeros up to kRowsTogether
  void (*turn)(const Columns&, int64_t m0, int64_t m1, int64_t c0, int64_t c1, float* to);
  void (*sampled_products)(const Sampled&, int64_t n0, int64_t n1);
};

constexpr int64_t kRowsTogether = 128;  // of x and dy: dot products of so many floats, summed up
constexpr int64_t kTile = 16;           // columns that are turned together

LOWBIT_DECLARE_KERNELS(CpuKernel)

}  // namespace gradients
}  // namespace lowbit
