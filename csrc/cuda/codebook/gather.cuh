// Rows of a weight of the family `codebook`, as numbers. It equals the PyTorch line
//
//   out = (codebook[row, group, codes] * scales[:, group] + outliers)[ids].to(dtype)
//
// with row = torch.arange(N)[:, None] and group = torch.arange(K) // group_size, or 0 where tables serve several rows
// or groups: the product and the sum are each rounded to float32, the result once more to its dtype. Without ids it is
// all of W. cuda/gather.cuh says how. Entries are read where they lie: tables that are read often stay in the
// first-level cache.
#pragma once
#include "cuda/codebook/gather.h"
#include "cuda/codebook/stored.h"
#include "cuda/gather.cuh"

namespace lowbit {
namespace cuda {
namespace codebook_gather {

using namespace gather;
using namespace codebook_stored;

struct Numbers {
  const void* codebook;
  Scales scales;
  int groups, table_row, table_group, codebook_dtype;

  struct Group {
    int64_t table;  // its first entry; -1: there is no such row
    float scale;
  };

  LOWBIT_DEVICE Group at(int64_t n, int64_t group) const {
    return {n * table_row + group * table_group, scales.at(n * groups + group)};
  }

  LOWBIT_DEVICE Group missing() const { return {-1, 0.0f}; }

  LOWBIT_DEVICE float value(uint32_t code, const Group& group) const {
    if (group.table < 0) return not_a_number();
    return multiply(float_at(codebook, DType(codebook_dtype), group.table + code), group.scale);
  }
};

// Args:
//   BITS, T: of the codes; the dtype of `out`.
//   scales, scale_*: common/codebook.h; null: none, and not nested.
//   group_factor, group_shift: the Divisor by group_size; tile_factor, tile_shift: that by the tiles of a row.
//   table_row, table_group: entries from a row's table to the next row's, from a group's to the next's; 0: the same.
//   groups: scales of a row. vectors: the rows of `out` begin at multiples of 16 bytes.
template <int BITS, DType T>
LOWBIT_KERNEL(THREADS, 4)
kernel(const uint8_t* tiles, const void* codebook, const void* scales, const float* scale_codebook,
       const float* scale_absmax, const float* scale_offset, const void* outlier_values, const void* outlier_columns,
       const int32_t* outlier_rows, const void* ids, void* out, int count, int N, int K, int group_size,
       uint32_t group_factor, int group_shift, uint32_t tile_factor, int tile_shift, int groups, int table_row,
       int table_group, int codebook_dtype, int scale_dtype, int outlier_dtype, int wide_columns, int wide_ids,
       int vectors) {
  const Gathered gathered = {tiles, outlier_values, outlier_columns, outlier_rows, ids, out, count, N, K, group_size,
                             {group_factor, group_shift}, {tile_factor, tile_shift}, outlier_dtype, wide_columns,
                             wide_ids, vectors};
  const Scales scale_values = {scales, scale_dtype, scale_codebook, scale_absmax, scale_offset};
  const Numbers numbers = {codebook, scale_values, groups, table_row, table_group, codebook_dtype};
  write_rows<BITS, T>(gathered, numbers);
}

}  // namespace codebook_gather
}  // namespace cuda
}  // namespace lowbit
