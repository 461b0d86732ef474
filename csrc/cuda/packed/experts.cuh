// Rows of x times the weights of a stack of experts of the family `packed`, [E * N, K]. It equals the PyTorch lines
//
//   W = ((codes - zeros[:, group]) * scales[:, group] + outliers).view(E, N, K)
//   y[i] = torch.nn.functional.linear(x[i // r], W[ids[i]], bias.view(E, N)[ids[i]])      for each i, r = S // T
//
// with group = torch.arange(K) // group_size. cuda/experts.cuh says which rows a block takes. Its product is that of
// packed/decode.cuh, 8 rows at a time, or of packed/batch.cuh, 32 rows at a time.
#pragma once
#include "cuda/experts.cuh"
#include "cuda/packed/batch.cuh"
#include "cuda/packed/decode.cuh"
#include "cuda/packed/experts.h"

namespace lowbit {
namespace cuda {
namespace packed_experts {

using experts::moved;

// Args:
//   row_tiles, order, row_tile_count: of experts::sort_rows().
//   N: rows of the weight of one expert. All else is of packed_decode::linear(), for the whole stack.
template <int BITS, DType T, bool CUT>
LOWBIT_KERNEL(decode::THREADS, (packed_decode::BLOCKS<BITS, T, 1, CUT>))
decode_kernel(const Words4* row_tiles, const Words2* order, int row_tile_count, const uint8_t* tiles,
              const void* scales, const void* zeros, const void* bias, const void* outlier_values,
              const void* outlier_columns, const int32_t* outlier_rows, const Element<T>* x, Element<T>* y, int N,
              int K, int groups, int group_size, uint32_t group_factor, int shift, int enter, int scale_row,
              int scale_group, int zero_row, int zero_group, int scale_dtype, int zero_dtype, int bias_dtype,
              int outlier_dtype, int wide_columns, int copy_x) {
  const experts::Part part = experts::part_of(row_tiles, order, row_tile_count);
  if (experts::writes_instead<T>(part, y, N, decode::ROWS, decode::THREADS)) return;
  const int64_t row = static_cast<int64_t>(part.expert) * N;  // of the stack
  packed_decode::linear<BITS, T, 1, CUT>(
      tiles + row * ((K + TILE - 1) / TILE) * (TILE * BITS / 8), moved(scales, row * scale_row, scale_dtype),
      moved(zeros, row * zero_row, zero_dtype), moved(bias, row, bias_dtype), outlier_values, outlier_columns,
      moved(outlier_rows, row), x, y, part.rows, N, K, groups, group_size, group_factor, shift, enter, scale_row,
      scale_group, zero_row, zero_group, scale_dtype, zero_dtype, bias_dtype, outlier_dtype, wide_columns, copy_x,
      nullptr, 1, part.at);
}

// Args:
//   M: rows of x. x_sums: [G, padded_rows(M)], packed_batch::sum_groups() of x; null: no zero has a residual.
//   All else as above, and of batch::linear().
template <int BITS, DType T, bool CUT>
LOWBIT_KERNEL(batch::THREADS, 1)
batch_kernel(const Words4* row_tiles, const Words2* order, int row_tile_count, const uint8_t* tiles,
             const void* scales, const void* zeros, const void* bias, const void* outlier_values,
             const void* outlier_columns, const int32_t* outlier_rows, const uint16_t* x, const float* x_sums,
             uint16_t* y, int M, int N, int K, int group_size, int scale_row, int scale_group, int zero_row,
             int zero_group, int scale_dtype, int zero_dtype, int bias_dtype, int outlier_dtype, int wide_columns,
             int copy_x, int stages) {
  constexpr int M_TILES = BATCH_ROWS / 8;
  const experts::Part part = experts::part_of(row_tiles, order, row_tile_count);
  if (experts::writes_instead<T>(part, y, N, batch::ROWS, batch::THREADS)) return;
  const int64_t row = static_cast<int64_t>(part.expert) * N;
  const batch::Task task = {tiles + row * ((K + TILE - 1) / TILE) * (TILE * BITS / 8), x, y, nullptr,
                            moved(bias, row, bias_dtype), outlier_values, outlier_columns, moved(outlier_rows, row),
                            part.rows, N, K, group_size, bias_dtype, outlier_dtype, wide_columns, copy_x, 1, stages};
  packed_batch::Groups<BITS, T, M_TILES, experts::RowsOfExpert> groups = {
      moved(scales, row * scale_row, scale_dtype), moved(zeros, row * zero_row, zero_dtype), x_sums, scale_row,
      scale_group, zero_row, zero_group, scale_dtype, zero_dtype, packed_batch::padded_rows(M), {}, {}, {}, {},
      part.at, part.rows};
  batch::linear<BITS, T, M_TILES, CUT, packed_batch::RESERVED>(task, groups, part.at);
}

}  // namespace packed_experts
}  // namespace cuda
}  // namespace lowbit
