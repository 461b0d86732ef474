// Few rows of x times a weight of the family `codebook`. For M <= 16 it equals the PyTorch line
//
//   y = torch.nn.functional.linear(x, codebook.to(x.dtype)[row, group, codes] * scales[:, group] + outliers, bias)
//
// with row = torch.arange(N)[:, None] and group = torch.arange(K) // group_size, or 0 where tables serve several rows
// or groups, float32 sums and one rounding to the dtype of x. As in a dense layer, entries have the dtype of x. The
// scale multiplies the float32 sum of a group.
//
// cuda/decode.cuh says how the work is shared out, and packed/decode.cuh how a thread's part of a tile becomes operands
// of products. Here a pair of codes becomes the pair of their entries:
//
// - up to 4 bits with a table for every row or group, and up to 3 bits always: in registers. PTX's prmt takes four of
//   eight bytes. A thread holds the low and the high bytes of the entries of its two rows; one prmt finds the low bytes
//   of four codes, which are those of two neighbouring lanes l and h (they share a word) in two neighbouring chunks;
// - 4 bits with one table: from 256 pairs of entries in shared memory;
// - 5 to 8 bits: from single entries in shared memory, a word holding those of rows g and g + 8.
//
// Tables in shared memory have a copy for each thread of a warp, in its own bank: random codes do not conflict.
#pragma once
#include "cuda/codebook/decode.h"
#include "cuda/codebook/stored.h"
#include "cuda/decode.cuh"
#include "cuda/primitives_permute.h"

// Unrolls a loop of a kernel so many times.
#ifdef LOWBIT_EMULATED
#define LOWBIT_UNROLL_BY(times)
#else
#define LOWBIT_UNROLL_BY(times) LOWBIT_PRAGMA(unroll times)
#define LOWBIT_PRAGMA(text) _Pragma(#text)
#endif

namespace lowbit {
namespace cuda {
namespace codebook_decode {

using namespace decode;
using namespace codebook_stored;

// The codes of a row of a tile as selectors of prmt, a nibble each. Word i of a plane has those of two lanes, l and h;
// l0-3 and h0-3 are the codes of a quad of chunks. Four neighbouring nibbles are l0 l1 h0 h1 or l2 l3 h2 h3.
template <int BITS>
struct Selectors {
  uint32_t codes[4][2];  // of word i: both halves of a quad; up to 3 bits a half of both quads

  LOWBIT_DEVICE explicit Selectors(const TileRow<BITS>& row) {
    LOWBIT_UNROLL
    for (int i = 0; i < 4; ++i) {
      codes[i][0] = codes[i][1] = 0;
      if constexpr (BITS == 4) {
        LOWBIT_UNROLL
        for (int quad = 0; quad < 2; ++quad) codes[i][quad] = permute_bytes(word(row.parts[quad], i), 0, 0x3120);
        continue;
      }
      if constexpr (BITS > 1) {
        const uint32_t s = permute_bytes(word(row.parts[0], i), 0, 0x3120);  // bytes l0-3 h0-3 l4-7 h4-7
        codes[i][0] = (s & 0x03030303u) | (s << 2 & 0x30303030u);
        codes[i][1] = (s >> 4 & 0x03030303u) | (s >> 2 & 0x30303030u);
      }
      if constexpr (BITS % 2) {
        const uint32_t octets = i < 2 ? row.octets.x : row.octets.y;
        const uint32_t s = permute_bytes(octets, 0, i % 2 ? 0x3232 : 0x1010);  // bytes l0-7 h0-7 l0-7 h0-7
        const uint32_t bits = (s & 0x00000F0Fu) | (s >> 4 & 0x0F0F0000u);      // bytes l0-3 h0-3 l4-7 h4-7
        // two neighbouring bits of a byte become the top bits of its two selectors
        constexpr uint32_t TOP = 0x11111111u << (BITS - 1);
        codes[i][0] |= (bits & 0x03030303u) * (BITS == 1 ? 9 : 36) & TOP;
        codes[i][1] |= BITS == 1 ? (bits >> 2 & 0x03030303u) * 9 & TOP : (bits & 0x0C0C0C0Cu) * 9 & TOP;
      }
    }
  }
};

// What codes of 4 bits are looked up with, none of them a constant to the compiler. The high words of products with the
// factors are shifts by 1, 16 and 17: PRMT and logic keep the unit of shifts busy, that of products is idle. LOP3 takes
// one constant: with `halves` in a register, an "and" and an "or" are one.
struct Constants {
  uint32_t by_1, by_16, by_17, halves;

  // zero: what only its caller knows to be zero.
  LOWBIT_DEVICE explicit Constants(uint32_t zero)
      : by_1(opaque(0x80000000u)), by_16(opaque(0x10000u)), by_17(opaque(0x8000u)), halves(0x3210u + zero) {}
};

// A table of up to 16 entries in registers.
template <int BITS, DType T>
struct Permuted {
  static constexpr int LAST = (1 << BITS) - 1, WORDS = BITS < 3 ? 1 : BITS == 3 ? 2 : 4;
  uint32_t low[WORDS], high[WORDS];  // bytes, the last entry again past the last

  LOWBIT_DEVICE void load_table(const void* codebook, int dtype, int64_t first) {
    uint32_t entries[LAST + 1];
    with_float_dtype(dtype, [&](auto stored) {
      LOWBIT_UNROLL
      for (int i = 0; i <= LAST; ++i) entries[i] = entry_at<T, decltype(stored)::value>(codebook, first + i);
    });
    LOWBIT_UNROLL
    for (int w = 0; w < WORDS; ++w) {
      low[w] = high[w] = 0;
      LOWBIT_UNROLL
      for (int byte = 0; byte < 4; ++byte) {
        const uint32_t entry = entries[4 * w + byte < LAST ? 4 * w + byte : LAST];
        low[w] |= (entry & 255) << 8 * byte;
        high[w] |= (entry >> 8) << 8 * byte;
      }
    }
  }

  // Four bytes of the table, by the four low nibbles of `codes`; of which half of 16 entries, by those of `half`.
  LOWBIT_DEVICE static uint32_t bytes(const uint32_t (&table)[WORDS], uint32_t codes, uint32_t half) {
    if constexpr (BITS < 4) return permute_bytes_by(table[0], table[WORDS - 1], codes);
    const uint32_t lower = permute_bytes_by(table[0], table[1], codes);
    const uint32_t upper = permute_bytes_by(table[2], table[3], codes);
    return permute_bytes_by(lower, upper, half);
  }

  // The entries of lanes l and h of word i in chunk 2 * twin, and in the next one.
  LOWBIT_DEVICE void look_up(const Selectors<BITS>& selectors, const Constants& known, int twin, int i,
                             uint32_t (&pairs)[2]) const {
    const int quad = twin / 2, round = twin % 2;
    uint32_t codes, half = 0;
    if constexpr (BITS == 4) {
      // byte n of the lower half of the table or, n + 4, of the upper one
      const uint32_t s = quad == 0 ? selectors.codes[i][0] : selectors.codes[i][1];
      codes = (round == 0 ? s : multiply_high(s, known.by_16)) & 0x7777u;
      half = masked_or(multiply_high(s, round == 0 ? known.by_1 : known.by_17), 0x4444u, known.halves);
    } else {
      codes = (round == 0 ? selectors.codes[i][0] : selectors.codes[i][1]) >> 16 * quad;
    }
    const uint32_t lows = bytes(low, codes, half), highs = bytes(high, codes, half);
    pairs[0] = permute_bytes(lows, highs, 0x6240), pairs[1] = permute_bytes(lows, highs, 0x7351);
  }
};

// Blocks that share a processor: two, where their registers suffice (benchmarks/tools/cuda_records says where).
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr int WIDEST_SHARED = 3;
#else
constexpr int WIDEST_SHARED = 4;
#endif
template <int BITS, Look LOOK, int M_TILES, bool ANY_GROUPS>
constexpr int BLOCKS_OF =
    BITS <= (LOOK == Look::registers ? WIDEST_SHARED : 4) && M_TILES == 1 && !ANY_GROUPS ? 2 : 1;

// Args:
//   BITS, T: of the codes; the dtype of x and y.
//   LOOK: how codes become entries.
//   M_TILES: products that 8 rows of x take each; M <= 8 * M_TILES.
//   ANY_GROUPS: groups may end inside a chunk of 32 columns, where the others' columns are masked, and have own tables.
//   tiles, N, K, bias, outlier_*, wide_columns, x, y, M, copy_x, parts, splits, group_factor: as of packed/decode.cuh.
//   table_row, table_group: entries from a row's table to the next row's, from a group's to the next's; 0: the same.
//   groups: scales of a row.
//   rows_of: the rows of x and y that the block multiplies.
template <int BITS, DType T, Look LOOK, int M_TILES, bool ANY_GROUPS, class RowsOf>
LOWBIT_DEVICE void linear(const uint8_t* tiles, const void* codebook, const void* scales, const float* scale_codebook,
                          const float* scale_absmax, const float* scale_offset, const void* bias,
                          const void* outlier_values, const void* outlier_columns, const int32_t* outlier_rows,
                          const uint16_t* x, uint16_t* y, int M, int N, int K, int group_size, uint32_t group_factor,
                          int groups, int table_row, int table_group, int codebook_dtype, int scale_dtype,
                          int bias_dtype, int outlier_dtype, int wide_columns, int copy_x, float* parts, int splits,
                          const RowsOf& rows_of) {
  const Share s = share(N, K, splits, rows_of);
  const int tables = TABLE_BYTES<LOOK, BITS> * (table_row == 0 ? 1 : ROW_WARPS);
  const Slices<M_TILES, uint16_t, RowsOf> slices = {x, M, K, tables, s.end_slice, copy_x != 0, rows_of};
  const Scales scale_values = {scales, scale_dtype, scale_codebook, scale_absmax, scale_offset};

  float sums[M_TILES][4] = {}, products[M_TILES][4] = {}, scale[2] = {};
  Permuted<BITS <= 4 ? BITS : 1, T> permuted[2];
  uint32_t twins[2][4][2] = {};  // of two rows and four words, the pairs of two chunks
  int group = -1, group_end = 0;  // the group that is multiplied, and, unless ANY_GROUPS, the chunk after it
  const Constants known(static_cast<uint32_t>(K) >> 31);

  auto load_words = [&](int of_group) {
    LOWBIT_UNROLL
    for (int half = 0; half < 2; ++half)
      permuted[half].load_table(codebook, codebook_dtype, static_cast<int64_t>(s.row[half]) * table_row +
                                                              static_cast<int64_t>(of_group) * table_group);
  };

  // Fills shared memory, where word (table, entry, lane) is the pair of a pair of codes, or an entry of two rows.
  auto store_tables = [&]() {
    constexpr int ENTRIES = LOOK == Look::pairs ? 256 : 1 << BITS;
    with_float_dtype(codebook_dtype, [&](auto stored) {
      const auto entry = [&](int n, int code) {
        const int64_t row = n < N ? n : N - 1;
        return entry_at<T, decltype(stored)::value>(codebook, row * table_row + code);
      };
      for (int i = thread_index(); i < tables / 16; i += THREADS) {
        const int e = i / 8 % ENTRIES, n = s.first_row + 16 * (i / 8 / ENTRIES) + i % 8;
        const uint32_t pair = LOOK == Look::pairs ? entry(0, e % 16) | entry(0, e / 16) << 16
                                                  : entry(n, e) | entry(n + 8, e) << 16;
        store_shared4(16 * i, Words4{pair, pair, pair, pair});
      }
    });
  };

  const int table = 4 * s.lane + (table_row == 0 ? 0 : s.row_warp * TABLE_BYTES<LOOK, BITS>);

  // The entries of columns 32 * chunk + 8t + 2i and the next.
  auto look_up = [&](const auto& w, int half, int chunk, int i) -> uint32_t {
    if constexpr (LOOK == Look::registers) {
      if constexpr (ANY_GROUPS) permuted[half].look_up(w[half], known, chunk / 2, i, twins[half][i]);
      return chunk % 2 == 0 ? twins[half][i][0] : twins[half][i][1];
    } else if constexpr (LOOK == Look::pairs) {
      // one byte of two codes, for two chunks at a time
      const uint32_t codes = word(w[half].parts[chunk / 4], i) >> 4 * (chunk % 2) & 0x0F0F0F0Fu;
      const uint32_t both = codes | codes >> 12;
      return load_shared_word(table + 128 * (chunk % 4 < 2 ? both & 255 : both >> 8 & 255));
    } else {
      const uint32_t codes = w[half].codes(chunk, i);
      const uint32_t first = load_shared_half(table + 128 * (codes & 0xFFFF) + 2 * half);
      return first | uint32_t(load_shared_half(table + 128 * (codes >> 16) + 2 * half)) << 16;
    }
  };

  auto look_up_twins = [&](const auto& w, int twin) {
    LOWBIT_UNROLL
    for (int half = 0; half < 2; ++half)
      LOWBIT_UNROLL
      for (int i = 0; i < 4; ++i) permuted[half].look_up(w[half], known, twin, i, twins[half][i]);
  };

  auto end_group = [&]() {
    LOWBIT_UNROLL
    for (int m = 0; m < M_TILES; ++m)
      LOWBIT_UNROLL
      for (int i = 0; i < 4; ++i) {
        sums[m][i] = fused_multiply_add(scale[i / 2], products[m][i], sums[m][i]);
        products[m][i] = 0.0f;
      }
  };

  auto enter_group = [&](int next) {
    if (next == group) return;
    if (group >= 0) end_group();
    group = next;
    scale_values.read(scale, {static_cast<int64_t>(s.row[0]) * groups + group,
                              static_cast<int64_t>(s.row[1]) * groups + group});
    if constexpr (LOOK == Look::registers && ANY_GROUPS)
      if (table_group != 0) load_words(group);
  };

  // Adds the products of one chunk of 32 columns; where ANY_GROUPS, of those in [begin, end).
  auto multiply_chunk = [&](const auto& w, int chunk, const Words4(&xs)[M_TILES], int column, int begin,
                            int end) {
    LOWBIT_UNROLL
    for (int step = 0; step < 2; ++step) {
      uint32_t a[4];
      LOWBIT_UNROLL
      for (int i = 0; i < 4; ++i) {
        a[i] = look_up(w, i % 2, chunk, 2 * step + i / 2);
        if constexpr (ANY_GROUPS) a[i] &= inside(column + 4 * step + i / 2 * 2, begin, end);
      }
      LOWBIT_UNROLL
      for (int m = 0; m < M_TILES; ++m)
        multiply_matrices<T>(products[m], a[0], a[1], a[2], a[3], word(xs[m], 2 * step), word(xs[m], 2 * step + 1));
    }
  };

  auto multiply_chunks = [&](const auto& w, int tile, int stage) {
    LOWBIT_UNROLL_BY((LOOK == Look::registers && ANY_GROUPS ? 1 : TILE / CHUNK))
    for (int chunk = 0; chunk < TILE / CHUNK; ++chunk) {
      const int k = tile * TILE + chunk * CHUNK;
      if (k >= K) break;
      Words4 xs[M_TILES];
      slices.read(xs, stage, s.k_warp * TILE + chunk * CHUNK + 8 * s.t, s.g);
      if constexpr (ANY_GROUPS) {
        const int end = k + CHUNK < K ? k + CHUNK : K;
        for (int next = k / group_size; next * group_size < end; ++next) {
          enter_group(next);
          multiply_chunk(w, chunk, xs, k + 8 * s.t, next * group_size, (next + 1) * group_size);
        }
      } else {
        if constexpr (LOOK == Look::registers)
          if (chunk % 2 == 0) look_up_twins(w, chunk / 2);
        if (chunk >= group_end - tile * (TILE / CHUNK)) {
          const int next = static_cast<int>(multiply_high(2u * (tile * (TILE / CHUNK) + chunk), group_factor));
          enter_group(next);
          group_end = group_factor == 0 ? 1 << 30 : (next + 1) * (group_size / CHUNK);
        }
        multiply_chunk(w, chunk, xs, 0, 0, 0);
      }
    }
  };

  auto multiply_tile = [&](const TileRow<BITS>(&w)[2], int tile, int stage) {
    if constexpr (LOOK == Look::registers) {
      const Selectors<BITS> selectors[2] = {Selectors<BITS>(w[0]), Selectors<BITS>(w[1])};
      multiply_chunks(selectors, tile, stage);
    } else {
      multiply_chunks(w, tile, stage);
    }
  };

  auto prepare = [&]() {
    if constexpr (LOOK == Look::registers)
      load_words(0);
    else
      store_tables();
    add_outliers<T, M_TILES>(s, {outlier_values, outlier_columns, outlier_rows, outlier_dtype, wide_columns}, x, M, K,
                             splits, sums, rows_of);
  };

  for_each_tile<BITS>(s, tiles, slices, prepare, multiply_tile);
  if (group >= 0) end_group();
  write_result<T, M_TILES>(s, sums, tables, bias, bias_dtype, y, parts, splits, M, N, rows_of);
}

template <int BITS, DType T, Look LOOK, int M_TILES, bool ANY_GROUPS>
LOWBIT_KERNEL(THREADS, (BLOCKS_OF<BITS, LOOK, M_TILES, ANY_GROUPS>))
kernel(const uint8_t* tiles, const void* codebook, const void* scales, const float* scale_codebook,
       const float* scale_absmax, const float* scale_offset, const void* bias, const void* outlier_values,
       const void* outlier_columns, const int32_t* outlier_rows, const uint16_t* x, uint16_t* y, int M, int N, int K,
       int group_size, uint32_t group_factor, int groups, int table_row, int table_group, int codebook_dtype,
       int scale_dtype, int bias_dtype, int outlier_dtype, int wide_columns, int copy_x, float* parts, int splits) {
  linear<BITS, T, LOOK, M_TILES, ANY_GROUPS>(
      tiles, codebook, scales, scale_codebook, scale_absmax, scale_offset, bias, outlier_values, outlier_columns,
      outlier_rows, x, y, M, N, K, group_size, group_factor, groups, table_row, table_group, codebook_dtype,
      scale_dtype, bias_dtype, outlier_dtype, wide_columns, copy_x, parts, splits, Neighbours());
}

}  // namespace codebook_decode
}  // namespace cuda
}  // namespace lowbit
