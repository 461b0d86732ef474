// Many rows of x times a weight of the family `packed`. For any M it equals the PyTorch line
//
//   y = torch.nn.functional.linear(x, (codes - zeros[:, group]) * scales[:, group] + outliers, bias)
//
// with group = torch.arange(K) // group_size, float32 sums and one rounding to the dtype of x.
//
// Operands are the exact integers code - center, as in decode.cuh. What the center leaves of a zero (the residual) multiplies the
// sums of x of the group, which sum_groups() makes before.
//
// cuda/batch.cuh says how the work is shared out.
#pragma once
#include "cuda/batch.cuh"
#include "cuda/packed/batch.h"

namespace lowbit {
namespace cuda {
namespace packed_batch {

using namespace batch;

template <int BITS, DType T, int M_TILES, class RowsOf = Neighbours>
struct Groups {
  const void* scales;
  const void* zeros;
  const float* x_sums;
  int scale_row, scale_group, zero_row, zero_group, scale_dtype, zero_dtype, x_sums_row;
  float scale[ROW_TILES][2], next_scale[ROW_TILES][2], next_zero[ROW_TILES][2];
  uint32_t center[ROW_TILES][2];
  RowsOf rows_of = {};  // this and how many there are: read where SORTED
  int rows = 0;

  LOWBIT_DEVICE void begin(const Share&, int) {}

  LOWBIT_DEVICE void fetch_group(const Share& s, int group) {
    LOWBIT_UNROLL
    for (int i = 0; i < 2 * ROW_TILES; ++i) {
      const int64_t n = s.row[i / 2][i % 2], at = group;
      next_scale[i / 2][i % 2] = float_at(scales, DType(scale_dtype), n * scale_row + at * scale_group);
      if (zeros != nullptr)
        next_zero[i / 2][i % 2] = float_at(zeros, DType(zero_dtype), n * zero_row + at * zero_group);
    }
  }

  // Where the residual is. Four threads have the same row. Two groups have places, as one of the threads may enter a
  // group before others have left the one before; a product is between it and the group after.
  LOWBIT_DEVICE static int residual_at(const Share& s, int group, int i) {
    return 4 * (group % 2 * ROWS + WARP_ROWS * s.warp + 8 * i + s.g);
  }

  LOWBIT_DEVICE void enter_group(const Share& s, int group) {
    LOWBIT_UNROLL
    for (int i = 0; i < 2 * ROW_TILES; ++i) {
      scale[i / 2][i % 2] = next_scale[i / 2][i % 2];
      int nearest = 1 << (BITS - 1);
      if (zeros != nullptr) {
        const float zero = next_zero[i / 2][i % 2], largest = static_cast<float>((1 << BITS) - 1);
        nearest = static_cast<int>((zero > 0.0f ? zero < largest ? zero : largest : 0.0f) + 0.5f);
        store_shared(residual_at(s, group, i), static_cast<float>(nearest) - zero);
      }
      center[i / 2][i % 2] = Centered<BITS, T>::prepare(nearest);
    }
  }

  LOWBIT_DEVICE uint32_t operand(uint32_t codes, int r, int half) const {
    return Centered<BITS, T>::to_operand(codes, center[r][half]);
  }

  // What the centers leave of the group's zeros, times the sums of x.
  LOWBIT_DEVICE void end_group(const Share& s, int group, Sums<M_TILES>& sums) const {
    if (x_sums == nullptr) return;
    const float* of_group = x_sums + static_cast<int64_t>(group) * x_sums_row;
    const float* from = of_group + s.work.first_x + 2 * s.t;
    LOWBIT_UNROLL
    for (int m = 0; m < M_TILES; ++m)
      LOWBIT_UNROLL
      for (int j = 0; j < 2; ++j) {
        float sum;
        if constexpr (RowsOf::SORTED) {
          const int row = 8 * m + 2 * s.t + j;
          sum = load(of_group + rows_of.of_x(row < rows ? row : 0));
        } else {
          sum = load(from + 8 * m + j);
        }
        LOWBIT_UNROLL
        for (int i = 0; i < 2 * ROW_TILES; ++i) {
          float& to = sums[i / 2][m][2 * (i % 2) + j];
          to = fused_multiply_add(scale[i / 2][i % 2], load_shared(residual_at(s, group, i)) * sum, to);
        }
      }
  }
};

// Args:
//   BITS, T, M_TILES, CUT, and what is not said here: of batch::linear().
//   scale_row, scale_group, zero_row, zero_group: between the values of neighbouring rows and groups; 0: one for all.
//   x_sums: [G, padded_rows(M)], sum_groups() of x; null: no zero has a residual.
template <int BITS, DType T, int M_TILES, bool CUT>
LOWBIT_KERNEL(THREADS, 1)
kernel(const uint8_t* tiles, const void* scales, const void* zeros, const void* bias, const void* outlier_values,
       const void* outlier_columns, const int32_t* outlier_rows, const uint16_t* x, const float* x_sums, uint16_t* y,
       float* parts, int M, int N, int K, int group_size, int scale_row, int scale_group, int zero_row, int zero_group,
       int scale_dtype, int zero_dtype, int bias_dtype, int outlier_dtype, int wide_columns, int copy_x, int splits,
       int stages) {
  const Task task = {tiles, x, y, parts, bias, outlier_values, outlier_columns, outlier_rows, M, N, K,
                     group_size, bias_dtype, outlier_dtype, wide_columns, copy_x, splits, stages};
  Groups<BITS, T, M_TILES> groups = {scales, zeros, x_sums, scale_row, scale_group, zero_row, zero_group, scale_dtype,
                                     zero_dtype, padded_rows(M), {}, {}, {}, {}};
  linear<BITS, T, M_TILES, CUT, RESERVED>(task, groups);
}

// x_sums[group, m] = x[m, group * group_size : (group + 1) * group_size].float().sum(), a warp for each; zeros for m >= M
template <DType T>
LOWBIT_KERNEL(THREADS, 1)
sum_groups(const uint16_t* x, float* x_sums, int M, int K, int group_size) {
  const int lane = thread_index() % 32, warp = thread_index() / 32, rows = padded_rows(M);
  const int64_t pair = static_cast<int64_t>(block_index()) * WARPS + warp;
  const int group = static_cast<int>(pair / rows), m = static_cast<int>(pair % rows);
  float sum = 0.0f;
  if (m < M) {
    const int begin = group * group_size, end = begin + group_size < K ? begin + group_size : K;
    for (int k = begin + lane; k < end; k += 32) sum += to_float<T>(load(x + static_cast<int64_t>(m) * K + k));
  }
  store_shared(4 * thread_index(), sum);
  barrier();
  if (lane > 0) return;
  sum = 0.0f;
  for (int i = 0; i < 32; ++i) sum += load_shared(4 * (32 * warp + i));
  store(x_sums + pair, sum);
}

}  // namespace packed_batch
}  // namespace cuda
}  // namespace lowbit
