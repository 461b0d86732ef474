// Rows of x, as int8, times a weight of the family `codebook`. For any M it equals the PyTorch lines
//
//   q, inverse = lowbit.backends.reference.quantize_activations(x, x_scale)
//   T, step = integers of the weight, in -32767 .. 32767, and the float32 step of each row (cuda/codebook/int8.cuh)
//   y = (q @ T.T).float() * step / inverse + torch.nn.functional.linear(x, outliers, bias)
//
// q @ T.T is exact, and so y is the reference's bit for bit where there are no outliers. Outliers multiply x itself.
//
// cuda/decode.cuh says how the work is shared out; here a block has 8 or 32 rows of x. Four neighbouring codes become
// four T, and these the low and the high bytes of two operands of mma.sync on bytes. Where a row has one scale or none,
// tables of T are in shared memory. Else it holds the entries, or, of tables for each group, these are loaded from where
// they are; every one is scaled and rounded: each thread knows its own group, so that groups may end anywhere.
#pragma once
#include "cuda/codebook/decode_simt.cuh"
#include "cuda/codebook/int8.cuh"
#include "cuda/codebook/linear_int8.h"
#include "cuda/decode.cuh"
#include "cuda/division.h"
#include "cuda/int8.cuh"
#include "cuda/packed/operands.h"
#include "cuda/primitives_int8.h"

namespace lowbit {
namespace cuda {
namespace codebook_linear_int8 {

using namespace decode;
using namespace codebook_stored;

// The slices of q in shared memory, from its byte `begin` on. Rows of q have whole tiles, and are where copies of 16
// bytes can begin.
template <int M_TILES>
struct Integers {
  static constexpr int STAGES = STAGES_OF<M_TILES>;
  const int8_t* q;
  int rows, columns, begin, end_slice;

  LOWBIT_DEVICE int stage(int slice) const { return begin + slice % STAGES * 8 * M_TILES * PITCH; }

  LOWBIT_DEVICE void fetch(int slice) const {
    constexpr int COPIES = SLICE / 16;  // of a row
    const int to = stage(slice), column = thread_index() % COPIES * 16;
    if (slice < end_slice && slice * SLICE + column < columns) {
      LOWBIT_ROLLED
      for (int m = thread_index() / COPIES; m < rows; m += THREADS / COPIES)
        copy_async(to + m * PITCH + column, q + static_cast<int64_t>(m) * columns + slice * SLICE + column, false);
    }
    commit_copies();  // one group for every slice, so that waiting can count them
  }
};

// Args:
//   BITS: of the codes.
//   M_TILES: products that the rows of x of a block take, 8 rows each.
//   TABLED: a row has one scale or none.
//   tiles, codebook .. table_group: as of codebook/decode.cuh. group_factor, group_shift: the Divisor by group_size,
//     which is at most K.
//   q, inverse, columns: of cuda/int8.h. steps: of find_steps().
//   x, dtype: as it was, for the outliers; the dtype of x and y.
//   one_table: one table serves every row. parts: int32 [splits, 2, M, N], what is written instead of y where
//     splits > 1.
template <int BITS, int M_TILES, bool TABLED>
LOWBIT_KERNEL(THREADS, (BITS <= 4 && M_TILES == 1 ? 2 : 1))
kernel(const uint8_t* tiles, const void* codebook, const void* scales, const float* scale_codebook,
       const float* scale_absmax, const float* scale_offset, const void* bias, const void* outlier_values,
       const void* outlier_columns, const int32_t* outlier_rows, const int8_t* q, const float* inverse,
       const float* steps, const void* x, void* y, int32_t* parts, int M, int N, int K, int columns, int group_size,
       uint32_t group_factor, int group_shift, int groups, int table_row, int table_group, int one_table,
       int codebook_dtype, int scale_dtype, int bias_dtype, int outlier_dtype, int wide_columns, int dtype,
       int splits) {
  constexpr int X_ROWS = 8 * M_TILES, ENTRIES = 1 << BITS;
  // Of blocks, rows of W run fastest, then splits, then rows of x.
  Share s = share(N, K, splits);
  const int first_x = s.split / splits * X_ROWS, x_rows = M - first_x < X_ROWS ? M - first_x : X_ROWS;
  const int slices_of_k = (s.tile_count + K_WARPS - 1) / K_WARPS;
  s.split %= splits;
  s.first_slice = s.split * slices_of_k / splits, s.end_slice = (s.split + 1) * slices_of_k / splits;

  const bool in_shared = TABLED || table_group == 0;
  const int table_end = in_shared ? 128 * ENTRIES : 0;  // 32 copies, or rows
  const Integers<M_TILES> slices = {q + static_cast<int64_t>(first_x) * columns, x_rows, columns, table_end,
                                    s.end_slice};
  const Scales scale_values = {scales, scale_dtype, scale_codebook, scale_absmax, scale_offset};
  const Divisor by_group = {group_factor, group_shift};

  int32_t low[M_TILES][4] = {}, high[M_TILES][4] = {};
  float scale[2] = {}, inverse_step[2];
  const char* table[2];  // of the group of rows g and g + 8, where it is not in shared memory
  int group_end = 0;     // where this thread's group ends
  LOWBIT_UNROLL
  for (int half = 0; half < 2; ++half) {
    inverse_step[half] = 1.0f / load(steps + s.row[half]);
    table[half] = static_cast<const char*>(codebook);
  }

  // Fills shared memory, where word (entry, copy) is an entry, or word (row, entry), as a float32 or as T.
  auto store_tables = [&]() {
    for (int i = thread_index(); i < table_end / 4; i += THREADS) {
      const int row = one_table ? 0 : i / ENTRIES, code = one_table ? i / 32 : i % ENTRIES;
      const int64_t n = s.first_row + row < N ? s.first_row + row : N - 1;
      float entry = float_at(codebook, DType(codebook_dtype), n * table_row + code);
      if constexpr (TABLED)
        entry = float_of(codebook_int8::fixed(multiply(entry, scale_values.at(n)), 1.0f / load(steps + n)));
      store_shared(4 * i, entry);
    }
  };

  auto enter_group_of = [&](int column) {
    const int group = by_group.quotient(column);
    group_end = (group + 1) * group_size;
    scale_values.read(scale, {static_cast<int64_t>(s.row[0]) * groups + group,
                              static_cast<int64_t>(s.row[1]) * groups + group});
    LOWBIT_UNROLL
    for (int half = 0; half < 2; ++half)
      table[half] = static_cast<const char*>(codebook) + size_of(codebook_dtype) *
                        (static_cast<int64_t>(s.row[half]) * table_row + static_cast<int64_t>(group) * table_group);
  };

  int words[2];  // where the tables of rows g and g + 8 begin
  LOWBIT_UNROLL
  for (int half = 0; half < 2; ++half)
    words[half] = 4 * (one_table ? s.lane : (16 * s.row_warp + 8 * half + s.g) * ENTRIES);
  const int shift = one_table ? 7 : 2;

  auto look_up = [&](int half, int code) -> uint32_t {
    if (TABLED) return load_shared_word(words[half] + (code << shift));
    float entry;
    if (in_shared)
      entry = load_shared(words[half] + (code << shift));
    else
      entry = float_of(float_bits(table[half] + size_of(codebook_dtype) * code, DType(codebook_dtype) == DType::f32),
                       codebook_dtype);
    return codebook_int8::fixed(multiply(entry, scale[half]), inverse_step[half]);
  };

  int8::Bytes<BITS> bytes[2] = {};

  // Rows of x that are not there repeat the last one. What is multiplied with them is not stored.
  int x_row[M_TILES];
  LOWBIT_UNROLL
  for (int m = 0; m < M_TILES; ++m) x_row[m] = 8 * m + s.g < x_rows ? 8 * m + s.g : x_rows - 1;

  // Adds the products of the chunk at column k. codes: of its row `half`, 4 columns from 8t + 4 * quad on, a byte each.
  auto multiply_chunk = [&](const uint32_t(&codes)[2][2], int k, int x_at) {
    uint32_t lows[4], highs[4];
    LOWBIT_UNROLL
    for (int quad = 0; quad < 2; ++quad) {
      uint32_t found[2][4];
      LOWBIT_UNROLL
      for (int i = 0; i < 4; ++i) {
        // Past K there are no groups, and q is zeros.
        const int column = k + 8 * s.t + 4 * quad + i;
        if (!TABLED && column >= group_end && column < K) enter_group_of(column);
        LOWBIT_UNROLL
        for (int half = 0; half < 2; ++half)
          found[half][i] = look_up(half, static_cast<int>(codes[half][quad] >> 8 * i & 0xFF));
      }
      LOWBIT_UNROLL
      for (int half = 0; half < 2; ++half) {
        const uint32_t first = permute_bytes(found[half][0], found[half][1], 0x5140);
        const uint32_t second = permute_bytes(found[half][2], found[half][3], 0x5140);
        lows[2 * quad + half] = permute_bytes(first, second, 0x5410);
        highs[2 * quad + half] = permute_bytes(first, second, 0x7632);
      }
    }
    LOWBIT_UNROLL
    for (int m = 0; m < M_TILES; ++m) {
      const Words2 xs = load_shared2(x_at + x_row[m] * PITCH);
      multiply_bytes(low[m], lows[0], lows[1], lows[2], lows[3], xs.x, xs.y);
      multiply_signed_bytes(high[m], highs[0], highs[1], highs[2], highs[3], xs.x, xs.y);
    }
  };

  auto multiply_tile = [&](const TileRow<BITS>(&w)[2], int tile, int stage) {
    const int x_at = stage + s.k_warp * TILE + 8 * s.t;
    uint32_t codes[2][2];
    if constexpr (TABLED) {
      LOWBIT_UNROLL
      for (int chunk = 0; chunk < CHUNKS; ++chunk) {
        LOWBIT_UNROLL
        for (int half = 0; half < 2; ++half) {
          bytes[half].next_chunk(w[half], chunk);
          codes[half][0] = bytes[half].of(w[half], chunk, 0), codes[half][1] = bytes[half].of(w[half], chunk, 1);
        }
        multiply_chunk(codes, tile * TILE + chunk * CHUNK, x_at + chunk * CHUNK);
      }
    } else {  // where a group may begin at every column, chunks share their code
      LOWBIT_ROLLED
      for (int chunk = 0; chunk < CHUNKS && tile * TILE + chunk * CHUNK < K; ++chunk) {
        LOWBIT_UNROLL
        for (int i = 0; i < 4; ++i) {
          const TileRow<BITS>& row = w[i / 2];
          codes[i / 2][i % 2] = permute_bytes(codebook_decode_simt::codes_at(row, chunk, 2 * (i % 2)),
                                              codebook_decode_simt::codes_at(row, chunk, 2 * (i % 2) + 1), 0x6420);
        }
        multiply_chunk(codes, tile * TILE + chunk * CHUNK, x_at + chunk * CHUNK);
      }
    }
  };

  // Adds the sums of the K_WARPS warps, and finishes them, unless there are other splits to add.
  auto write_result = [&]() {
    constexpr int PLANE = K_WARPS * ROWS * X_ROWS * 4;
    barrier();  // nobody reads x any more, and no copy is on its way
    LOWBIT_UNROLL
    for (int m = 0; m < M_TILES; ++m)
      LOWBIT_UNROLL
      for (int i = 0; i < 4; ++i) {
        const int n = 16 * s.row_warp + 8 * (i / 2) + s.g, row = 8 * m + 2 * s.t + i % 2;
        const int at = table_end + 4 * ((s.k_warp * X_ROWS + row) * ROWS + n);
        store_shared(at, float_of(static_cast<uint32_t>(low[m][i])));
        store_shared(at + PLANE, float_of(static_cast<uint32_t>(high[m][i])));
      }
    barrier();
    const codebook_int8::Finish finish = {inverse, steps, bias, outlier_values, outlier_columns, outlier_rows, x, y, N, K,
                                          bias_dtype, outlier_dtype, wide_columns, dtype};
    LOWBIT_ROLLED
    for (int i = thread_index(); i < x_rows * ROWS; i += THREADS) {
      const int n = s.first_row + i % ROWS, m = first_x + i / ROWS;
      if (n >= N) continue;
      uint32_t both[2] = {};
      LOWBIT_UNROLL
      for (int k = 0; k < K_WARPS; ++k)
        LOWBIT_UNROLL
        for (int plane = 0; plane < 2; ++plane)
          both[plane] += load_shared_word(table_end + plane * PLANE + 4 * (k * X_ROWS * ROWS + i));
      const int32_t sums[2] = {static_cast<int32_t>(both[0]), static_cast<int32_t>(both[1])};
      if (splits == 1) {
        finish(sums[0], sums[1], m, n);
        continue;
      }
      LOWBIT_UNROLL
      for (int plane = 0; plane < 2; ++plane)
        store(parts + (static_cast<int64_t>(2 * s.split + plane) * M + m) * N + n, sums[plane]);
    }
  };

  for_each_tile<BITS>(s, tiles, slices, store_tables, multiply_tile);
  write_result();
}

}  // namespace codebook_linear_int8
}  // namespace cuda
}  // namespace lowbit
