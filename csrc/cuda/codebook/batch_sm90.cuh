// Many rows of x times a weight of the family `codebook`, on sm_90a. It equals the PyTorch line
//
//   y = torch.nn.functional.linear(x, codebook.to(x.dtype)[row, codes] * scales[:, group] + outliers, bias)
//
// with row = torch.arange(N)[:, None], or 0 where one table serves all rows, group = torch.arange(K) // group_size,
// float32 sums and one rounding to the dtype of x. As in codebook/decode.cuh, entries have the dtype of x, and the scale
// multiplies the float32 sum of a group.
//
// cuda/batch_sm90.cuh says how the work is shared out. Tables lie in shared memory after the ring. One table has a copy
// for each thread of a warp, in its own bank. Of tables of rows, each warp has those of its own 16 rows, and stores them
// itself when it begins with other rows: no other warp waits.
#pragma once
#include "cuda/batch_sm90.cuh"
#include "cuda/codebook/batch_sm90.h"
#include "cuda/codebook/stored.h"

namespace lowbit {
namespace cuda {
namespace codebook_batch_sm90 {

using namespace batch_sm90;
using namespace codebook_stored;

// Bytes of shared memory for tables: those of ROWS rows, which is twice the copies of one; where there is no room for
// the former, the latter.
template <int BITS, int X_ROWS>
constexpr int TABLE_BYTES = (BITS == 8 && X_ROWS == 128 ? 128 : 256) << BITS;

template <int BITS, DType T, int X_ROWS>
struct Tables {
  static constexpr int RESERVED = TABLE_BYTES<BITS, X_ROWS>, WARP_BYTES = 32 << BITS;
  const void* codebook;
  Scales scales;
  int groups, table_row, codebook_dtype, N;
  uint32_t table;  // the address of entry 0 of this thread
  int first_row;   // of the block, that has its tables there

  struct Group {
    float scale[2];
  };
  struct Operands {
    float scale[2], residual[2];
  };

  LOWBIT_DEVICE static constexpr bool has_residuals() { return false; }

  LOWBIT_DEVICE int warp() const { return thread_index() / 32 - (THREADS / 32 - CONSUMER_WARPS); }

  // Word (entry, thread of a warp) is an entry of the one table.
  LOWBIT_DEVICE void begin(uint32_t at) {
    if (table_row != 0) {
      table = at + warp() * WARP_BYTES + thread_index() % 32 / 4 * 4;
      return;
    }
    table = at + thread_index() % 32 * 4;
    with_float_dtype(codebook_dtype, [&](auto stored) {
      for (int i = thread_index(); i < 32 << BITS; i += THREADS)
        store_word(at + 4 * i, entry_at<T, decltype(stored)::value>(codebook, i / 32));
    });
  }

  // Word (entry, g) is an entry of rows g and g + 8 of the warp. Rows past the last one have its table.
  LOWBIT_DEVICE void begin_rows(int row) {
    if (table_row == 0 || row == first_row) return;
    first_row = row;
    const int lane = thread_index() % 32;
    const uint32_t at = table - lane / 4 * 4;
    warp_barrier();  // nobody looks up an entry of the rows before
    with_float_dtype(codebook_dtype, [&](auto stored) {
      const auto entry = [&](int n, int code) {
        return entry_at<T, decltype(stored)::value>(codebook, static_cast<int64_t>(n < N ? n : N - 1) * table_row + code);
      };
      for (int i = lane; i < 8 << BITS; i += 32) {
        const int n = row + 16 * warp() + i % 8;
        store_word(at + 4 * i, entry(n, i / 8) | entry(n + 8, i / 8) << 16);
      }
    });
    warp_barrier();
  }

  LOWBIT_DEVICE Group fetch_group(const int (&row)[2], int group) const {
    Group found;
    scales.read(found.scale,
                {static_cast<int64_t>(row[0]) * groups + group, static_cast<int64_t>(row[1]) * groups + group});
    return found;
  }

  LOWBIT_DEVICE Operands operands(const Group& group) const { return {{group.scale[0], group.scale[1]}, {}}; }

  LOWBIT_DEVICE uint32_t operand(const Words<BITS>& words, const Operands&, int chunk, int upper, int j) const {
    const uint32_t codes = words.codes(chunk, upper, j, 0), from = table + (table_row == 0 ? 0 : 2 * upper);
    const int shift = table_row == 0 ? 7 : 5;
    return load_pair(from + ((codes & 0xFFFF) << shift)) | load_pair(from + (codes >> 16 << shift)) << 16;
  }
};

// Args:
//   BITS, T, X_ROWS, and what is not said here: of batch_sm90::linear().
//   groups: scales of a row. scale_codebook, scale_absmax, scale_offset: of nested scales (common/codebook.h), or null.
//   table_row: entries from a row's table to the next row's; 0: one for all.
template <int BITS, DType T, int X_ROWS>
__global__ void __launch_bounds__(THREADS, 1)
kernel(const __grid_constant__ CUtensorMap parts_map, const __grid_constant__ CUtensorMap octets_map,
       const __grid_constant__ CUtensorMap x_map, const void* codebook, const void* scales, const float* scale_codebook,
       const float* scale_absmax, const float* scale_offset, const void* bias, const void* outlier_values,
       const void* outlier_columns, const int32_t* outlier_rows, const uint16_t* x, uint16_t* y, int M, int N, int K,
       uint32_t group_factor, int groups, int table_row, int codebook_dtype, int scale_dtype, int bias_dtype,
       int outlier_dtype, int wide_columns, float* parts, int splits) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  const Task task = {&parts_map, &octets_map, &x_map, bias, outlier_values, outlier_columns, outlier_rows, x, y, M, N, K,
                     group_factor, bias_dtype, outlier_dtype, wide_columns, parts, splits};
  Tables<BITS, T, X_ROWS> tables = {codebook, {scales, scale_dtype, scale_codebook, scale_absmax, scale_offset}, groups,
                                    table_row, codebook_dtype, N, 0, -1};
  linear<BITS, T, X_ROWS>(task, tables);
#endif
}

}  // namespace codebook_batch_sm90
}  // namespace cuda
}  // namespace lowbit
