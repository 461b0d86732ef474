// Many rows of x times a weight of the family `codebook`. For any M it equals the PyTorch line
//
//   y = torch.nn.functional.linear(x, codebook.to(x.dtype)[row, group, codes] * scales[:, group] + outliers, bias)
//
// with row = torch.arange(N)[:, None] and group = torch.arange(K) // group_size, or 0 where tables serve several rows
// or groups, float32 sums and one rounding to the dtype of x. As in codebook/decode.cuh, entries have the dtype of x,
// and the scale multiplies the float32 sum of a chunk.
//
// cuda/batch.cuh says how the work is shared out. An entry is read from shared memory once for 64 rows of x. One table
// has up to 32 copies, as many as there is room for: thread i of a warp reads copy i, in a bank of its own. Of tables of
// rows, the 8 row pairs of a product have neighbouring words, so that at most four threads, of one row, can conflict.
//
// Tables of groups are read where they are, and so are those that have no room: an entry is needed about once for each
// 32 rows of x. The instances for groups that end anywhere do so, whatever the groups.
#pragma once
#include "cuda/batch.cuh"
#include "cuda/codebook/batch.h"
#include "cuda/codebook/stored.h"
#include "cuda/packed/operands.h"

namespace lowbit {
namespace cuda {
namespace codebook_batch {

using namespace batch;
using namespace codebook_stored;

template <int BITS, DType T, int M_TILES, bool MAY_GATHER>
struct Tables {
  static constexpr int ENTRIES = 1 << BITS;
  const void* codebook;
  Scales scales;
  int groups, table_row, table_group, codebook_dtype, copies, N;
  bool gathers;  // entries are read where they are
  float scale[ROW_TILES][2], next_scale[ROW_TILES][2];
  int table, next_tile, next_half;  // where entry 0 is; from there to that of the next 16 rows, and of row g + 8
  const char* at[ROW_TILES][2];     // where it is of the group that was entered, where entries are gathered

  // Fills shared memory from `at` on. Word (entry, copy) is an entry; or word (16 rows, entry, g) those of rows g and
  // g + 8. The barrier of the first slice is before the first look-up.
  LOWBIT_DEVICE void begin(const Share& s, int at) {
    if (MAY_GATHER && gathers) return;
    const bool one = table_row == 0;
    next_tile = one ? 0 : 32 * ENTRIES, next_half = one ? 0 : 2;
    table = at + (one ? 4 * (thread_index() % 32 & ((1 << copies) - 1)) : ROW_TILES * s.warp * next_tile + 4 * s.g);
    const int words = one ? ENTRIES << copies : ROWS / 2 * ENTRIES;
    with_float_dtype(codebook_dtype, [&](auto stored) {
      const auto entry = [&](int n, int code) {
        return entry_at<T, decltype(stored)::value>(codebook, static_cast<int64_t>(n < N ? n : N - 1) * table_row + code);
      };
      LOWBIT_ROLLED
      for (int i = thread_index(); i < words; i += THREADS) {
        const int n = s.work.first_row + i / (8 * ENTRIES) * 16 + i % 8, code = one ? i >> copies : i / 8 % ENTRIES;
        store_shared(at + 4 * i, static_cast<uint16_t>(entry(n, code)));
        if (!one) store_shared(at + 4 * i + 2, static_cast<uint16_t>(entry(n + 8, code)));
      }
    });
  }

  LOWBIT_DEVICE void fetch_group(const Share& s, int group) {
    LOWBIT_UNROLL
    for (int r = 0; r < ROW_TILES; ++r)
      scales.read(next_scale[r], {static_cast<int64_t>(s.row[r][0]) * groups + group,
                                  static_cast<int64_t>(s.row[r][1]) * groups + group});
  }

  LOWBIT_DEVICE void enter_group(const Share& s, int group) {
    LOWBIT_UNROLL
    for (int i = 0; i < 2 * ROW_TILES; ++i) {
      scale[i / 2][i % 2] = next_scale[i / 2][i % 2];
      if constexpr (MAY_GATHER) {
        const int64_t first = static_cast<int64_t>(s.row[i / 2][i % 2]) * table_row;
        at[i / 2][i % 2] = static_cast<const char*>(codebook) +
                           size_of(codebook_dtype) * (first + static_cast<int64_t>(group) * table_group);
      }
    }
  }

  LOWBIT_DEVICE uint32_t gathered(const char* table, uint32_t code) const {
    const uint32_t bits = float_bits(table + size_of(codebook_dtype) * static_cast<int>(code),
                                     DType(codebook_dtype) == DType::f32);
    return from_float<T>(float_of(bits, codebook_dtype));
  }

  LOWBIT_DEVICE uint32_t operand(uint32_t codes, int r, int half) const {
    if (MAY_GATHER && gathers) return gathered(at[r][half], codes & 0xFFFF) | gathered(at[r][half], codes >> 16) << 16;
    const int from = table + r * next_tile + half * next_half, shift = table_row == 0 ? 2 + copies : 5;
    const uint32_t low = load_shared_half(from + static_cast<int>((codes & 0xFFFF) << shift));
    return low | uint32_t(load_shared_half(from + static_cast<int>(codes >> 16 << shift))) << 16;
  }

  LOWBIT_DEVICE void end_group(const Share&, int, Sums<M_TILES>&) const {}
};

// Args:
//   BITS, T, M_TILES, CUT, and what is not said here: of batch::linear().
//   groups: scales of a row. scale_codebook, scale_absmax, scale_offset: of nested scales (common/codebook.h), or null.
//   table_row, table_group: entries from a row's table to the next row's, from a group's to the next's; 0: the same.
//   copies: the table has 2^copies copies. gathers: no table is in shared memory; only where CUT.
template <int BITS, DType T, int M_TILES, bool CUT>
LOWBIT_KERNEL(THREADS, 1)
kernel(const uint8_t* tiles, const void* codebook, const void* scales, const float* scale_codebook,
       const float* scale_absmax, const float* scale_offset, const void* bias, const void* outlier_values,
       const void* outlier_columns, const int32_t* outlier_rows, const uint16_t* x, uint16_t* y, float* parts, int M,
       int N, int K, int group_size, int groups, int table_row, int table_group, int codebook_dtype, int scale_dtype,
       int bias_dtype, int outlier_dtype, int wide_columns, int copy_x, int splits, int stages, int copies,
       int gathers) {
  const Task task = {tiles, x, y, parts, bias, outlier_values, outlier_columns, outlier_rows, M, N, K,
                     group_size, bias_dtype, outlier_dtype, wide_columns, copy_x, splits, stages};
  Tables<BITS, T, M_TILES, CUT> tables = {
      codebook, {scales, scale_dtype, scale_codebook, scale_absmax, scale_offset}, groups, table_row, table_group,
      codebook_dtype, copies, N, gathers != 0, {}, {}, 0, 0, 0, {}};
  linear<BITS, T, M_TILES, CUT, RESERVED>(task, tables);
}

}  // namespace codebook_batch
}  // namespace cuda
}  // namespace lowbit
