// Few rows of x times a weight of the family `codebook`, by the multiply-adds of single threads (SIMT) instead of tensor
// cores. It equals the PyTorch line
//
//   y = torch.nn.functional.linear(x, codebook.to(x.dtype)[row, group, codes] * scales[:, group] + outliers, bias)
//
// with row = torch.arange(N)[:, None] and group = torch.arange(K) // group_size, or 0 where tables serve several rows
// or groups, float32 sums and one rounding to the dtype of x. The scale multiplies the float32 sum of a group.
//
// It takes what codebook/decode.cuh cannot: float32 x, whose products with float32 entries a tensor core would round
// (as pieces of bfloat16 they are nine products each), and, in any dtype, a table of more than 16 entries for every
// group, which is larger than the group's codes.
//
// cuda/decode.cuh says how the work is shared out. Thread 4g + t of a warp has columns 8t .. 8t + 7 of each chunk of 32,
// and of them the products of rows g and g + 8 with all rows of x. So a code is looked up once, and groups may end
// anywhere: every thread knows its own. One table of float32 has a copy for each thread of a warp in shared memory, in
// its own bank; the entries of other tables are loaded from where they are, as each is needed about once.
#pragma once
#include "cuda/codebook/decode_simt.h"
#include "cuda/codebook/stored.h"
#include "cuda/decode.cuh"
#include "cuda/division.h"
#include "cuda/packed/operands.h"

namespace lowbit {
namespace cuda {
namespace codebook_decode_simt {

using namespace decode;
using namespace codebook_stored;

// The codes of columns 32 * chunk + 8t + 2i and the next, as a pair of integers.
template <int BITS>
LOWBIT_DEVICE uint32_t codes_at(const TileRow<BITS>& row, int chunk, int i) {
  constexpr int FIELDS = BITS == 8 ? 2 : BITS >= 4 ? 4 : 8;
  uint32_t widest = 0, above = 0;
  LOWBIT_UNROLL
  for (int part = 0; part < CHUNKS / FIELDS && BITS > 1; ++part) {
    const uint32_t here = word(row.parts[part], i);
    widest = chunk / FIELDS == part ? here : widest;
  }
  if constexpr (BITS == 6 || BITS == 7) above = word(row.parts[2], i);
  return pair_of_codes<BITS>(widest, above, row.octets, chunk, i);
}

// Args:
//   BITS, T: of the codes; the dtype of x and y.
//   tiles, N, K, bias, outlier_*, wide_columns, x, y, M, copy_x, parts, splits: as of packed/decode.cuh; M <= X_ROWS.
//   codebook, scales, groups, table_row, table_group: as of codebook/decode.cuh.
//   group_size: at most K. group_factor, group_shift: the Divisor by it.
template <int BITS, DType T>
LOWBIT_KERNEL(THREADS, 1)
kernel(const uint8_t* tiles, const void* codebook, const void* scales, const float* scale_codebook,
       const float* scale_absmax, const float* scale_offset, const void* bias, const void* outlier_values,
       const void* outlier_columns, const int32_t* outlier_rows, const Element<T>* x, Element<T>* y, int M, int N, int K,
       int group_size, uint32_t group_factor, int group_shift, int groups, int table_row, int table_group,
       int codebook_dtype, int scale_dtype, int bias_dtype, int outlier_dtype, int wide_columns, int copy_x,
       float* parts, int splits) {
  const Share s = share(N, K, splits);
  const bool one_table = T == DType::f32 && table_row == 0;
  const int table_end = one_table ? 128 << BITS : 0;
  const Slices<1, Element<T>> slices = {x, M, K, table_end, s.end_slice, copy_x != 0};
  const Scales scale_values = {scales, scale_dtype, scale_codebook, scale_absmax, scale_offset};
  const Divisor by_group = {group_factor, group_shift};
  const bool wide_entries = DType(codebook_dtype) == DType::f32;

  float sums[2][X_ROWS] = {}, products[2][X_ROWS] = {}, scale[2] = {};
  const char* table[2] = {};  // of the group of rows g and g + 8
  int group_end = 0;          // where this thread's group ends

  auto store_table = [&]() {
    for (int i = thread_index(); i < table_end / 16; i += THREADS) {
      const uint32_t entry = bits_of(float_at(codebook, DType(codebook_dtype), i / 8));
      store_shared4(16 * i, Words4{entry, entry, entry, entry});
    }
  };

  auto end_group = [&]() {
    LOWBIT_UNROLL
    for (int half = 0; half < 2; ++half)
      LOWBIT_UNROLL
      for (int m = 0; m < X_ROWS; ++m) {
        sums[half][m] = fused_multiply_add(scale[half], products[half][m], sums[half][m]);
        products[half][m] = 0.0f;
      }
  };

  auto enter_group_of = [&](int column) {
    if (column < group_end) return;
    if (group_end > 0) end_group();
    const int group = by_group.quotient(column);
    group_end = (group + 1) * group_size;
    scale_values.read(scale, {static_cast<int64_t>(s.row[0]) * groups + group,
                              static_cast<int64_t>(s.row[1]) * groups + group});
    LOWBIT_UNROLL
    for (int half = 0; half < 2; ++half)
      table[half] = static_cast<const char*>(codebook) + size_of(codebook_dtype) *
                        (static_cast<int64_t>(s.row[half]) * table_row + static_cast<int64_t>(group) * table_group);
  };

  // The entries of four neighbouring columns of both rows, as x meets them.
  auto look_up = [&](const uint32_t(&codes)[2][2], float(&entries)[2][4]) {
    LOWBIT_UNROLL
    for (int half = 0; half < 2; ++half)
      LOWBIT_UNROLL
      for (int i = 0; i < 4; ++i) {
        const int code = static_cast<int>(codes[half][i / 2] >> 16 * (i % 2) & 0xFFFF);
        if (one_table) {
          entries[half][i] = load_shared(4 * s.lane + 128 * code);
        } else {
          const char* at = table[half] + size_of(codebook_dtype) * code;
          const float entry = float_of(float_bits(at, wide_entries), codebook_dtype);
          entries[half][i] = value_of<T>(rounded_to<T>(entry));
        }
      }
  };

  // Columns column .. column + 3 of the slice, of row m of x.
  auto load_x = [&](float(&values)[4], int stage, int m, int column) {
    const int at = stage + m * PITCH_OF<Element<T>> + static_cast<int>(sizeof(Element<T>)) * column;
    if constexpr (T == DType::f32) {
      const Words4 four = load_shared4(at);
      LOWBIT_UNROLL
      for (int i = 0; i < 4; ++i) values[i] = float_of(word(four, i));
    } else {
      const Words2 four = load_shared2(at);
      LOWBIT_UNROLL
      for (int i = 0; i < 4; ++i)
        values[i] = to_float<T>(static_cast<uint16_t>((i < 2 ? four.x : four.y) >> 16 * (i % 2)));
    }
  };

  // Adds the products of columns begin .. end - 1, which are of one group, among the 8 from `column` on.
  auto multiply_columns = [&](const TileRow<BITS>(&w)[2], int chunk, int stage, int column, int begin, int end) {
    const int in_slice = s.k_warp * TILE + chunk * CHUNK + 8 * s.t;
    LOWBIT_UNROLL
    for (int first = 0; first < 8; first += 4) {
      uint32_t codes[2][2];
      LOWBIT_UNROLL
      for (int i = 0; i < 4; ++i) codes[i / 2][i % 2] = codes_at(w[i / 2], chunk, first / 2 + i % 2);
      float entries[2][4];
      look_up(codes, entries);
      LOWBIT_UNROLL
      for (int i = 0; i < 4; ++i)
        if (column + first + i < begin || column + first + i >= end) entries[0][i] = entries[1][i] = 0.0f;
      LOWBIT_UNROLL
      for (int m = 0; m < X_ROWS; ++m) {
        if (m >= M) break;
        float values[4];
        load_x(values, stage, m, in_slice + first);
        LOWBIT_UNROLL
        for (int i = 0; i < 4; ++i)
          LOWBIT_UNROLL
          for (int half = 0; half < 2; ++half)
            products[half][m] = fused_multiply_add(entries[half][i], values[i], products[half][m]);
      }
    }
  };

  auto multiply_tile = [&](const TileRow<BITS>(&w)[2], int tile, int stage) {
    LOWBIT_ROLLED
    for (int chunk = 0; chunk < CHUNKS; ++chunk) {
      const int column = tile * TILE + chunk * CHUNK + 8 * s.t, end = column + 8 < K ? column + 8 : K;
      LOWBIT_ROLLED
      for (int begin = column; begin < end; begin = group_end) {
        enter_group_of(begin);
        multiply_columns(w, chunk, stage, column, begin, group_end < end ? group_end : end);
      }
    }
  };

  // The outliers of a row are shared out to its splits and threads.
  auto add_outliers = [&]() {
    if (outlier_values == nullptr) return;
    const int first = (s.split * K_WARPS + s.k_warp) * 4 + s.t;
    LOWBIT_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int end = load(outlier_rows + s.row[half] + 1);
      LOWBIT_ROLLED
      for (int i = load(outlier_rows + s.row[half]) + first; i < end; i += splits * SUMS) {
        const float value = float_at(outlier_values, DType(outlier_dtype), i);
        const int column = wide_columns ? load(static_cast<const int32_t*>(outlier_columns) + i)
                                        : load(static_cast<const uint16_t*>(outlier_columns) + i);
        LOWBIT_UNROLL
        for (int m = 0; m < X_ROWS; ++m)
          if (m < M) {
            const float element = value_of<T>(load(x + static_cast<int64_t>(m) * K + column));
            sums[half][m] = fused_multiply_add(value, element, sums[half][m]);
          }
      }
    }
  };

  // Adds the sums of all threads of a row in order, then the bias: y; or, where there are other splits to add, the part
  // of this one.
  auto write_result = [&]() {
    barrier();  // nobody reads x any more, and no copy is on its way
    LOWBIT_UNROLL
    for (int half = 0; half < 2; ++half)
      LOWBIT_UNROLL
      for (int m = 0; m < X_ROWS; ++m) {
        const int n = 16 * s.row_warp + 8 * half + s.g;
        store_shared(table_end + 4 * (((4 * s.k_warp + s.t) * X_ROWS + m) * ROWS + n), sums[half][m]);
      }
    barrier();
    for (int i = thread_index(); i < M * ROWS; i += THREADS) {
      const int n = s.first_row + i % ROWS, m = i / ROWS;
      if (n >= N) continue;
      float sum = load_shared(table_end + 4 * i);
      for (int k = 1; k < SUMS; ++k) sum += load_shared(table_end + 4 * (k * X_ROWS * ROWS + i));
      if (splits > 1) {
        store(parts + (static_cast<int64_t>(s.split) * M + m) * N + n, sum);
        continue;
      }
      if (bias != nullptr) sum += float_at(bias, DType(bias_dtype), n);
      store(y + static_cast<int64_t>(m) * N + n, rounded_to<T>(sum));
    }
  };

  const auto prepare = [&]() {
    store_table();
    add_outliers();
  };
  for_each_tile<BITS>(s, tiles, slices, prepare, multiply_tile);
  if (group_end > 0) end_group();
  write_result();
}

// y = parts.sum(0) + bias, in the order of the splits.
template <DType T>
LOWBIT_KERNEL(THREADS, 1)
add_splits(const float* parts, const void* bias, Element<T>* y, int M, int N, int splits, int bias_dtype) {
  const int i = block_index() * THREADS + thread_index();
  if (i >= M * N) return;
  float sum = load(parts + i);
  for (int split = 1; split < splits; ++split) sum += load(parts + static_cast<int64_t>(split) * M * N + i);
  if (bias != nullptr) sum += float_at(bias, DType(bias_dtype), i % N);
  store(y + i, rounded_to<T>(sum));
}

}  // namespace codebook_decode_simt
}  // namespace cuda
}  // namespace lowbit
