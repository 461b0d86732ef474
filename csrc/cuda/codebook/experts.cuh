// Rows of x times the weights of a stack of experts of the family `codebook`, [E * N, K]. It equals the PyTorch lines
//
//   W = (codebook.to(x.dtype)[row, group, codes] * scales[:, group] + outliers).view(E, N, K)
//   y[i] = torch.nn.functional.linear(x[i // r], W[ids[i]], bias.view(E, N)[ids[i]])      for each i, r = S // T
//
// with row = torch.arange(E * N)[:, None] and group = torch.arange(K) // group_size, or 0 where tables serve several
// rows or groups. cuda/experts.cuh says which rows a block takes. Its product is that of codebook/decode.cuh, 8 rows at
// a time, or of codebook/batch.cuh, 32 rows at a time.
#pragma once
#include "cuda/codebook/batch.cuh"
#include "cuda/codebook/decode.cuh"
#include "cuda/codebook/experts.h"
#include "cuda/experts.cuh"

namespace lowbit {
namespace cuda {
namespace codebook_experts {

using codebook_decode::Look;
using experts::moved;

// What both kernels are given of the whole stack. Of nested scales, each expert has whole blocks.
struct Stack {
  const uint8_t* tiles;
  const void *codebook, *scales;
  const float *scale_codebook, *scale_absmax, *scale_offset;
  const void *bias, *outlier_values, *outlier_columns;
  const int32_t* outlier_rows;
  int N;  // rows of the weight of one expert
  int K, group_size, groups, table_row, table_group, codebook_dtype, scale_dtype, bias_dtype, outlier_dtype,
      wide_columns, copy_x;

  // Of one expert.
  template <int BITS>
  LOWBIT_DEVICE Stack of(int expert) const {
    Stack one = *this;
    const int64_t row = static_cast<int64_t>(expert) * N, first_scale = row * groups;
    one.tiles += row * ((K + TILE - 1) / TILE) * (TILE * BITS / 8);
    one.codebook = moved(codebook, row * table_row, codebook_dtype);
    one.scales = moved(scales, first_scale, scale_dtype);
    if (scale_codebook != nullptr) one.scale_absmax += first_scale / NESTED_BLOCK;
    one.bias = moved(bias, row, bias_dtype);
    one.outlier_rows = moved(outlier_rows, row);
    return one;
  }
};

// Blocks that share a processor: of 3 and 4 bits in registers, two would spill here.
template <int BITS, Look LOOK, bool ANY_GROUPS>
constexpr int BLOCKS = LOOK == Look::registers && BITS >= 3 ? 1 : codebook_decode::BLOCKS_OF<BITS, LOOK, 1, ANY_GROUPS>;

// Args:
//   row_tiles, order, row_tile_count: of experts::sort_rows(). All else is of codebook_decode::linear().
template <int BITS, DType T, Look LOOK, bool ANY_GROUPS>
LOWBIT_KERNEL(decode::THREADS, (BLOCKS<BITS, LOOK, ANY_GROUPS>))
decode_kernel(const Words4* row_tiles, const Words2* order, int row_tile_count, const uint8_t* tiles,
              const void* codebook, const void* scales, const float* scale_codebook, const float* scale_absmax,
              const float* scale_offset, const void* bias, const void* outlier_values, const void* outlier_columns,
              const int32_t* outlier_rows, int N, int K, int group_size, int groups, int table_row, int table_group,
              int codebook_dtype, int scale_dtype, int bias_dtype, int outlier_dtype, int wide_columns, int copy_x,
              const uint16_t* x, uint16_t* y, uint32_t group_factor) {
  const experts::Part part = experts::part_of(row_tiles, order, row_tile_count);
  if (experts::writes_instead<T>(part, y, N, decode::ROWS, decode::THREADS)) return;
  const Stack stack = {tiles, codebook, scales, scale_codebook, scale_absmax, scale_offset, bias, outlier_values,
                       outlier_columns, outlier_rows, N, K, group_size, groups, table_row, table_group, codebook_dtype,
                       scale_dtype, bias_dtype, outlier_dtype, wide_columns, copy_x};
  const Stack w = stack.of<BITS>(part.expert);
  codebook_decode::linear<BITS, T, LOOK, 1, ANY_GROUPS>(
      w.tiles, w.codebook, w.scales, w.scale_codebook, w.scale_absmax, w.scale_offset, w.bias, w.outlier_values,
      w.outlier_columns, w.outlier_rows, x, y, part.rows, w.N, w.K, w.group_size, group_factor, w.groups, w.table_row,
      w.table_group, w.codebook_dtype, w.scale_dtype, w.bias_dtype, w.outlier_dtype, w.wide_columns, w.copy_x, nullptr,
      1, part.at);
}

// Args: as above, and of codebook_batch::kernel().
template <int BITS, DType T, bool CUT>
LOWBIT_KERNEL(batch::THREADS, 1)
batch_kernel(const Words4* row_tiles, const Words2* order, int row_tile_count, const uint8_t* tiles,
             const void* codebook, const void* scales, const float* scale_codebook, const float* scale_absmax,
             const float* scale_offset, const void* bias, const void* outlier_values, const void* outlier_columns,
             const int32_t* outlier_rows, int N, int K, int group_size, int groups, int table_row, int table_group,
             int codebook_dtype, int scale_dtype, int bias_dtype, int outlier_dtype, int wide_columns, int copy_x,
             const uint16_t* x, uint16_t* y, int stages, int copies, int gathers) {
  const experts::Part part = experts::part_of(row_tiles, order, row_tile_count);
  if (experts::writes_instead<T>(part, y, N, batch::ROWS, batch::THREADS)) return;
  const Stack stack = {tiles, codebook, scales, scale_codebook, scale_absmax, scale_offset, bias, outlier_values,
                       outlier_columns, outlier_rows, N, K, group_size, groups, table_row, table_group, codebook_dtype,
                       scale_dtype, bias_dtype, outlier_dtype, wide_columns, copy_x};
  const Stack w = stack.of<BITS>(part.expert);
  const batch::Task task = {w.tiles, x, y, nullptr, w.bias, w.outlier_values, w.outlier_columns, w.outlier_rows,
                            part.rows, w.N, w.K, w.group_size, w.bias_dtype, w.outlier_dtype, w.wide_columns, w.copy_x,
                            1, stages};
  codebook_batch::Tables<BITS, T, BATCH_ROWS / 8, CUT> tables = {
      w.codebook, {w.scales, w.scale_dtype, w.scale_codebook, w.scale_absmax, w.scale_offset}, w.groups, w.table_row,
      w.table_group, w.codebook_dtype, copies, w.N, gathers != 0, {}, {}, 0, 0, 0, {}};
  batch::linear<BITS, T, BATCH_ROWS / 8, CUT, codebook_batch::RESERVED>(task, tables, part.at);
}

}  // namespace codebook_experts
}  // namespace cuda
}  // namespace lowbit
