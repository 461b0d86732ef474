// Few rows of x times a weight of the family `packed`. For M <= 16 it equals the PyTorch line
//
//   y = torch.nn.functional.linear(x, (codes - zeros[:, group]) * scales[:, group] + outliers, bias)
//
// with group = torch.arange(K) // group_size, float32 sums and one rounding to the dtype of x.
//
// Codes are in tiles (lowbit/backends/triton/tiles.py). Weights are the left operand of mma.sync, so 16 rows of W by up
// to 8 rows of x are one product, and no weight is moved between threads: the 16 bytes that thread 4g + t loads from a
// part of a plane are lanes 8t .. 8t+7 of row g. After one shift they are the codes of 8 neighbouring columns: the
// operands of two products whose x is read at the same columns.
//
// float32 x is three bfloat16, which are multiplied one after the other: exact, too.
//
// The operands are the exact integers code - center, where center is the zero point, or the integer nearest to it. What
// that leaves (the residual) multiplies the sum of x, which a second product makes. The scale multiplies the float32
// sum of a group. So no weight is ever rounded.
//
// cuda/decode.cuh says how the work is shared out. The block prepares scales and centers of a slice ahead, one value a
// thread, in a table in shared memory: so each is loaded and converted once, not by the four threads of a quad.
#pragma once
#include "cuda/decode.cuh"
#include "cuda/packed/decode.h"
#include "cuda/packed/operands.h"

namespace lowbit {
namespace cuda {
namespace packed_decode {

// Slices of x in shared memory: while one is read, the others are on their way. Of float32, one as pieces is read, and
// one is on its way as it is.
template <DType T, int M_TILES>
constexpr int STAGES = T == DType::f32 ? 2 : STAGES_OF<M_TILES>;
template <DType T, int M_TILES>
constexpr int STAGES_IN_MEMORY = T == DType::f32 ? 1 : STAGES<T, M_TILES>;
constexpr int PITCH = PITCH_OF<>;

// The table of a slice has an entry for each row at each place where a group may begin: the first chunk of each tile at
// least. With 4 rows between, threads that write neighbouring places do so in different banks. An entry is a scale and
// a center; what the center leaves of a float zero is behind all of them.
constexpr int ENTRY = 8, TABLE_PITCH = ENTRY * (ROWS + 4);
constexpr int MOST_ENTRIES = SLICE / CHUNK * ROWS / THREADS;  // of a thread

// At which of the 8 chunks of a tile a group may begin: a bit for each. There, sums are always added.
inline int entries(const packed::Weight& w) {
  const int64_t columns = w.group_size >= w.K ? TILE : w.group_size;
  return columns % TILE == 0 ? 0x01 : columns % (TILE / 2) == 0 ? 0x11 : columns % (TILE / 4) == 0 ? 0x55 : 0xFF;
}

// The binary logarithm of how many places the table of a slice has, a power of two for each tile. With 8, each thread
// prepares one entry: there are no fewer, though a tile may need but the first of two.
inline int table_shift(int enter) { return enter <= 0x11 ? 3 : enter == 0x55 ? 4 : 5; }

template <DType T, int M_TILES>
LOWBIT_DEVICE int table_begin(int rows_of_x) {
  return rows_of_x * (STAGES_IN_MEMORY<T, M_TILES> * PIECES_OF<T> * PITCH + (T == DType::f32 ? 4 * SLICE : 0));
}

// shift: of table_shift(); -1 where there is no table.
template <DType T, int M_TILES>
int shared_bytes(int rows_of_x, int shift, bool residuals) {
  const int x = rows_of_x * (STAGES_IN_MEMORY<T, M_TILES> * PIECES_OF<T> * PITCH + (T == DType::f32 ? 4 * SLICE : 0));
  const int tables = shift < 0 ? 0 : (residuals ? 4 : 2) * (TABLE_PITCH << shift);
  const int sums = K_WARPS * ROWS * 8 * M_TILES * 4;
  return std::max(x + tables, sums);
}

inline int shift_of(const packed::Weight& w) { return cuts_chunks(w) ? -1 : table_shift(entries(w)); }

inline bool has_residuals(const packed::Weight& w) { return w.zeros != nullptr && w.zeros_dtype != DType::u8; }

// How many rows of x a launch takes: 8 of float32, which takes three times the room, and where groups end anywhere; as
// many as shared memory has room for.
template <DType T>
int rows_at_once(const packed::Weight& w, const Device& device) {
  const int shift = shift_of(w);
  const bool residuals = has_residuals(w);
  if (T != DType::f32 && shift >= 0 && shared_bytes<T, 2>(16, shift, residuals) <= device.shared_bytes) return 16;
  int rows = 8;
  while (rows > 1 && shared_bytes<T, 1>(rows, shift, residuals) > device.shared_bytes) rows /= 2;
  return rows;
}

// A scale and a zero as they are stored, and as they are used.
struct Stored {
  uint32_t scale, zero;
};
struct Used {
  float scale, residual;
  int nearest;
};

// Slices as for_each_tile() takes them: a function that begins to fetch one, and knows where it is.
template <int STAGES_, class Fetch>
struct Ring {
  static constexpr int STAGES = STAGES_;
  Fetch fetch;

  LOWBIT_DEVICE int stage(int) const { return 0; }
};

// Args:
//   BITS, T: of the codes; the dtype of x and y.
//   M_TILES: products that 8 rows of x take each; M <= 8 * M_TILES.
//   CUT: groups may end inside a chunk of 32 columns. Then each group's columns are multiplied with the others masked.
//   scale_row, scale_group, zero_row, zero_group: between the values of neighbouring rows and groups; 0: one for all.
//   groups: of a row.
//   group_factor: 2^31 / (chunks of a group), rounded up. This, shift (of table_shift()) and enter (of entries()) are
//     not read where CUT.
//   copy_x: the rows of x begin at multiples of 16 bytes.
//   parts: float32 [splits, M, N], what is written instead of y where splits > 1.
//   rows_of: the rows of x and y that the block multiplies.
template <int BITS, DType T, int M_TILES, bool CUT, class RowsOf>
LOWBIT_DEVICE void linear(const uint8_t* tiles, const void* scales, const void* zeros, const void* bias,
                          const void* outlier_values, const void* outlier_columns, const int32_t* outlier_rows,
                          const Element<T>* x, Element<T>* y, int M, int N, int K, int groups, int group_size,
                          uint32_t group_factor, int shift, int enter, int scale_row, int scale_group, int zero_row,
                          int zero_group, int scale_dtype, int zero_dtype, int bias_dtype, int outlier_dtype,
                          int wide_columns, int copy_x, float* parts, int splits, const RowsOf& rows_of) {
  constexpr DType OPERAND = OPERAND_OF<T>;
  using Codes = Operand<BITS, OPERAND>;
  constexpr int PIECES = PIECES_OF<T>, SIZE = sizeof(Element<T>), AHEAD = STAGES<T, M_TILES> - 1;
  const Share s = share(N, K, splits, rows_of);

  float sums[M_TILES][4] = {}, products[M_TILES][4] = {}, x_sums[M_TILES][4] = {};
  float scale[2] = {}, residual[2] = {};
  typename Codes::Center center[2] = {Codes::center(1 << (BITS - 1)), Codes::center(1 << (BITS - 1))};
  enum { NO_ZEROS, INTEGERS, FLOATS };
  const int kind_of_zeros = opaque(zeros == nullptr ? NO_ZEROS : zero_dtype == int(DType::u8) ? INTEGERS : FLOATS);
  const int residuals = opaque(kind_of_zeros == FLOATS);

  auto end_group = [&](int next_residual = -1) {
    LOWBIT_ROLLED  // a loop is a branch: where there are no residuals, nothing of it is issued
    for (int once = 0; once < residuals; ++once) {
      LOWBIT_UNROLL
      for (int m = 0; m < M_TILES; ++m)
        LOWBIT_UNROLL
        for (int i = 0; i < 4; ++i) {
          products[m][i] = fused_multiply_add(residual[i / 2], x_sums[m][i], products[m][i]);
          x_sums[m][i] = 0.0f;
        }
      if (next_residual < 0) continue;
      LOWBIT_UNROLL
      for (int half = 0; half < 2; ++half) residual[half] = load_shared(next_residual + 8 * ENTRY * half);
    }
    LOWBIT_UNROLL
    for (int m = 0; m < M_TILES; ++m)
      LOWBIT_UNROLL
      for (int i = 0; i < 4; ++i) {
        sums[m][i] = fused_multiply_add(scale[i / 2], products[m][i], sums[m][i]);
        products[m][i] = 0.0f;
      }
  };

  // Where the values of a row begin, and the bytes from one group to the next.
  struct At {
    const char *scale, *zero;
  };
  const int scale_step = opaque(scale_group * size_of(scale_dtype));
  const int zero_step = opaque(zero_group * size_of(zero_dtype));
  auto row_at = [&](int n) {
    const int64_t row = n < N ? n : N - 1;
    return At{static_cast<const char*>(scales) + row * scale_row * size_of(scale_dtype),
              static_cast<const char*>(zeros) + row * zero_row * size_of(zero_dtype)};
  };

  auto values_at = [&](const At& at, int of_group) {
    Stored v = {};
    v.scale = float_bits(at.scale + static_cast<int64_t>(of_group) * opaque(scale_step),
                         scale_dtype == static_cast<int>(DType::f32));
    if (kind_of_zeros == NO_ZEROS) return v;
    const char* zero = at.zero + static_cast<int64_t>(of_group) * opaque(zero_step);
    v.zero = kind_of_zeros == INTEGERS ? load(reinterpret_cast<const uint8_t*>(zero))
                                       : float_bits(zero, zero_dtype == static_cast<int>(DType::f32));
    return v;
  };

  auto used = [&](const Stored& v) {
    Used u = {float_of(v.scale, scale_dtype), 0.0f, 1 << (BITS - 1)};
    if (kind_of_zeros == NO_ZEROS) return u;
    u.nearest = static_cast<int>(v.zero);
    if (kind_of_zeros == FLOATS) {
      const float zero = float_of(v.zero, zero_dtype), largest = static_cast<float>((1 << BITS) - 1);
      u.nearest = static_cast<int>((zero > 0.0f ? zero < largest ? zero : largest : 0.0f) + 0.5f);
      u.residual = static_cast<float>(u.nearest) - zero;
    }
    return u;
  };

  // The table of every other slice is in the same place. The values of a thread are of row entry_row (and, where there
  // are more than 8 places, of others) at place `place`.
  if (CUT) shift = 3;  // there is no table
  const int table_bytes = opaque(TABLE_PITCH << shift), residuals_behind = 2 * table_bytes;
  const int entry_row = opaque(thread_index() >> shift), place = thread_index() & ((1 << shift) - 1);
  const int entry_chunk = opaque(place << (5 - shift));
  int write_to = opaque(table_begin<T, M_TILES>(M) + place * TABLE_PITCH + ENTRY * entry_row);
  int read_from = opaque(table_begin<T, M_TILES>(M) + (s.k_warp << (shift - 2)) * TABLE_PITCH +
                         ENTRY * (16 * s.row_warp + s.g));
  int other_table = table_bytes;  // how much further the table is that is written next
  At entry_at = row_at(s.first_row + entry_row);
  entry_at = {opaque(entry_at.scale), opaque(entry_at.zero)};
  Stored ahead[MOST_ENTRIES] = {};  // of the slice whose table is written next

  // Calls function(number, row of the block) for each entry that this thread prepares.
  auto for_each_entry = [&](auto function) {
    function(0, entry_row);
    if (shift == 3) return;
    LOWBIT_UNROLL
    for (int i = 1; i < MOST_ENTRIES; ++i) {
      const int row = entry_row + i * (THREADS >> shift);
      if (row < ROWS) function(i, row);
    }
  };

  auto load_table = [&](int slice) {
    if (slice >= s.end_slice) return;
    const int of_group = static_cast<int>(multiply_high(2u * (SLICE / CHUNK * slice + entry_chunk), group_factor));
    for_each_entry([&](int i, int row) {
      ahead[i] = Stored{};  // past the last group, where x is zeros
      if (of_group < groups) ahead[i] = values_at(i == 0 ? entry_at : row_at(s.first_row + row), of_group);
    });
  };

  auto store_table = [&]() {
    for_each_entry([&](int i, int row) {
      const Used u = used(ahead[i]);
      const int to = write_to + ENTRY * (row - entry_row);
      store_shared(to, Words2{bits_of(u.scale), Codes::prepare(u.nearest)});
      if (residuals) store_shared(to + residuals_behind, u.residual);
    });
    write_to += other_table, other_table = -other_table;
  };

  // x: where this thread's part of a slice comes from, and goes to. Of float32, it goes behind the pieces.
  constexpr int ROW_BYTES = T == DType::f32 ? 4 * SLICE : PITCH, AT_ONCE = 16 / SIZE, COPIES = SLICE / AT_ONCE;
  const int stage_bytes = opaque(M * PITCH);
  const int unsplit = T == DType::f32 ? PIECES * stage_bytes : 0;
  const int x_first = thread_index() / COPIES, x_column = thread_index() % COPIES * AT_ONCE;
  const int x_to = opaque(unsplit + x_first * ROW_BYTES + SIZE * x_column);
  const char* const x_from =
      opaque(reinterpret_cast<const char*>(x + static_cast<int64_t>(x_first) * K + x_column));
  const int64_t x_step = THREADS / COPIES * static_cast<int64_t>(K) * SIZE;
  const int ring_bytes = opaque(STAGES_IN_MEMORY<T, M_TILES> * stage_bytes);
  int stage = 0;  // where the next slice goes; after its turn that is where the one is that is multiplied

  // Begins to copy a slice of x; where x is not at multiples of 16 bytes, it is loaded instead.
  auto fetch_x = [&](int slice) {
    const int first = slice * SLICE;
    if (slice < s.end_slice && copy_x) {
      const bool beyond = first + x_column >= K;
      const char* from = x_from + static_cast<int64_t>(first) * SIZE;  // not read where it is beyond
      int to = stage + x_to;
      LOWBIT_ROLLED
      for (int m = x_first; m < M; m += THREADS / COPIES) {
        if constexpr (RowsOf::SORTED)
          from = reinterpret_cast<const char*>(x + (beyond ? 0 : rows_of.of_x(m) * K + first + x_column));
        copy_async(to, from, beyond);
        to += THREADS / COPIES * ROW_BYTES;
        from += x_step;
      }
    } else if (slice < s.end_slice) {
      LOWBIT_ROLLED
      for (int i = thread_index(); i < M * SLICE; i += THREADS) {
        const int m = i / SLICE, column = i % SLICE;
        const bool beyond = first + column >= K;
        store_shared(stage + unsplit + m * ROW_BYTES + SIZE * column,
                     beyond ? Element<T>(0) : load(x + rows_of.of_x(m) * K + first + column));
      }
    }
    commit_copies();  // one group for every slice, so that waiting can count them
    stage += stage_bytes;
    if (T == DType::f32 || stage == ring_bytes) stage = 0;
  };

  // The pieces of the slice of float32 x that has arrived, 4 columns at a time.
  auto split_x = [&]() {
    for (int i = thread_index(); i < M * (SLICE / 4); i += THREADS) {
      const Words4 four = load_shared4(unsplit + 16 * i);
      uint32_t first[3], second[3];
      split_pair(four.x, four.y, first);
      split_pair(four.z, four.w, second);
      const int m = i / (SLICE / 4), column = i % (SLICE / 4) * 4;
      LOWBIT_UNROLL
      for (int piece = 0; piece < 3; ++piece)
        store_shared((piece * M + m) * PITCH + 2 * column, Words2{first[piece], second[piece]});
    }
  };

  // In the main loop, the slice `slice - AHEAD` has just arrived, for all threads.
  auto fetch = [&](int slice) {
    if (slice >= s.first_slice + AHEAD) {
      if constexpr (T == DType::f32) {
        split_x();
        barrier();  // the pieces are there for all threads
      }
      if constexpr (!CUT) {
        store_table();  // of the next slice; that of the one before is not read any more
        load_table(slice - AHEAD + 2);
      }
    }
    fetch_x(slice);
  };

  auto prepare = [&]() {
    if constexpr (!CUT) {
      load_table(s.first_slice);
      store_table();
      load_table(s.first_slice + 1);
    }
    add_outliers<T, M_TILES>(s, {outlier_values, outlier_columns, outlier_rows, outlier_dtype, wide_columns}, x, M, K,
                             splits, sums, rows_of);
  };

  // Adds the products of one chunk of 32 columns; where CUT, of those in [begin, end). weights[half][i] are columns
  // 8t + 2i and the next.
  auto multiply_chunk = [&](const uint32_t(&weights)[2][4], const Words4(&xs)[PIECES][M_TILES], int column, int begin,
                            int end) {
    LOWBIT_UNROLL
    for (int step = 0; step < 2; ++step) {
      uint32_t a[4];
      LOWBIT_UNROLL
      for (int i = 0; i < 4; ++i) a[i] = weights[i % 2][2 * step + i / 2];
      if constexpr (CUT) {
        LOWBIT_UNROLL
        for (int i = 0; i < 2; ++i) {
          const uint32_t mask = inside(column + 4 * step + 2 * i, begin, end);
          a[2 * i] &= mask, a[2 * i + 1] &= mask;
        }
      }
      LOWBIT_UNROLL
      for (int piece = PIECES - 1; piece >= 0; --piece)
        LOWBIT_UNROLL
        for (int m = 0; m < M_TILES; ++m) {
          const uint32_t b0 = word(xs[piece][m], 2 * step), b1 = word(xs[piece][m], 2 * step + 1);
          multiply_matrices<OPERAND>(products[m], a[0], a[1], a[2], a[3], b0, b1);
        }
    }
    LOWBIT_ROLLED
    for (int once = 0; once < residuals; ++once) {
      LOWBIT_UNROLL
      for (int step = 0; step < 2; ++step) {
        uint32_t ones[2];
        LOWBIT_UNROLL
        for (int i = 0; i < 2; ++i) {
          ones[i] = OPERAND == DType::f16 ? 0x3C003C00u : 0x3F803F80u;
          if constexpr (CUT) ones[i] &= inside(column + 4 * step + 2 * i, begin, end);
        }
        LOWBIT_UNROLL
        for (int piece = PIECES - 1; piece >= 0; --piece)
          LOWBIT_UNROLL
          for (int m = 0; m < M_TILES; ++m) {
            const uint32_t b0 = word(xs[piece][m], 2 * step), b1 = word(xs[piece][m], 2 * step + 1);
            multiply_matrices<OPERAND>(x_sums[m], ones[0], ones[0], ones[1], ones[1], b0, b1);
          }
      }
    }
  };

  // Rows of x that are not there repeat the last one. What is multiplied with them is not stored.
  int x_at[M_TILES];
  LOWBIT_UNROLL
  for (int m = 0; m < M_TILES; ++m)
    x_at[m] = opaque((8 * m + s.g < M ? 8 * m + s.g : M - 1) * PITCH + 2 * (s.k_warp * TILE + 8 * s.t));

  auto read_x = [&](Words4(&xs)[PIECES][M_TILES], int chunk) {
    LOWBIT_UNROLL
    for (int piece = 0; piece < PIECES; ++piece)
      LOWBIT_UNROLL
      for (int m = 0; m < M_TILES; ++m)
        xs[piece][m] = load_shared4(stage + x_at[m] + piece * stage_bytes + 2 * chunk * CHUNK);
  };

  Codes operands[2] = {};

  auto multiply_tile = [&](const TileRow<BITS>(&w)[2], int, int) {
    int at = read_from;
    LOWBIT_UNROLL
    for (int chunk = 0; chunk < CHUNKS; ++chunk) {
      LOWBIT_UNROLL
      for (int half = 0; half < 2; ++half) operands[half].next_chunk(w[half], chunk);
      Words4 xs[PIECES][M_TILES];
      read_x(xs, chunk);
      if (enter & 1 << chunk) {
        end_group(at + residuals_behind);  // before the first one, all is zero
        LOWBIT_UNROLL
        for (int half = 0; half < 2; ++half) {
          const Words2 entry = load_shared2(at + 8 * ENTRY * half);
          scale[half] = float_of(entry.x);
          center[half] = Codes::lifted(entry.y);
        }
        at += TABLE_PITCH;
      }
      uint32_t weights[2][4];
      LOWBIT_UNROLL
      for (int i = 0; i < 8; ++i) weights[i % 2][i / 2] = operands[i % 2].of(w[i % 2], chunk, i / 2, center[i % 2]);
      multiply_chunk(weights, xs, 0, 0, 0);
    }
    read_from += other_table;
  };

  // Where CUT: small code rather than few instructions. The values of the next group are loaded ahead.
  int group = -1, group_ahead = -1;
  Stored values[2] = {};
  auto fetch_group = [&](int next) {
    group_ahead = next;
    LOWBIT_UNROLL
    for (int half = 0; half < 2; ++half) values[half] = values_at(row_at(s.row[half]), next);
  };

  auto enter_group = [&](int next) {
    if (next == group) return;
    end_group();
    if (group_ahead != next) fetch_group(next);
    LOWBIT_UNROLL
    for (int half = 0; half < 2; ++half) {
      const Used u = used(values[half]);
      scale[half] = u.scale, residual[half] = u.residual;
      center[half].lifted[0] = Codes::prepare(u.nearest);
    }
    group = next;
    if (next + 1 < groups) fetch_group(next + 1);
  };

  auto multiply_tile_cut = [&](const TileRow<BITS>(&w)[2], int tile, int) {
    constexpr int FIELDS = Codes::FIELDS;
    LOWBIT_UNROLL
    for (int part = 0; part < CHUNKS / FIELDS; ++part)
      LOWBIT_ROLLED
      for (int field = 0; field < FIELDS; ++field) {
        const int chunk = part * FIELDS + field, k = tile * TILE + chunk * CHUNK;
        if (k >= K) break;
        Words4 xs[PIECES][M_TILES];
        read_x(xs, chunk);
        uint32_t pairs[2][4];
        LOWBIT_UNROLL
        for (int half = 0; half < 2; ++half)
          LOWBIT_UNROLL
          for (int i = 0; i < 4; ++i)
            pairs[half][i] = pair_of_codes<BITS>(word(w[half].parts[part], i),
                                                 BITS == 6 || BITS == 7 ? word(w[half].parts[BITS / 2 - 1], i) : 0,
                                                 w[half].octets, chunk, i);
        const int end = k + CHUNK < K ? k + CHUNK : K;
        LOWBIT_ROLLED
        for (int next = k / group_size; next * group_size < end; ++next) {
          enter_group(next);
          uint32_t weights[2][4];
          LOWBIT_UNROLL
          for (int i = 0; i < 8; ++i)
            weights[i % 2][i / 2] = Codes::Shifted::to_operand(pairs[i % 2][i / 2], center[i % 2].lifted[0]);
          multiply_chunk(weights, xs, k + 8 * s.t, next * group_size, (next + 1) * group_size);
        }
      }
  };

  const Ring<STAGES<T, M_TILES>, decltype(fetch)> ring = {fetch};
  if constexpr (CUT)
    for_each_tile<BITS>(s, tiles, ring, prepare, multiply_tile_cut);
  else
    for_each_tile<BITS>(s, tiles, ring, prepare, multiply_tile);
  end_group();
  write_result<T, M_TILES>(s, sums, 0, bias, bias_dtype, y, parts, splits, M, N, rows_of);
}

// Registers are kept for two blocks of a processor, but not where they would spill.
template <int BITS, DType T, int M_TILES, bool CUT>
constexpr int BLOCKS = BITS <= 4 && M_TILES == 1 && T != DType::f32 && !CUT ? 2 : 1;

template <int BITS, DType T, int M_TILES, bool CUT>
LOWBIT_KERNEL(THREADS, (BLOCKS<BITS, T, M_TILES, CUT>))
kernel(const uint8_t* tiles, const void* scales, const void* zeros, const void* bias, const void* outlier_values,
       const void* outlier_columns, const int32_t* outlier_rows, const Element<T>* x, Element<T>* y, int M, int N, int K,
       int groups, int group_size, uint32_t group_factor, int shift, int enter, int scale_row, int scale_group,
       int zero_row, int zero_group, int scale_dtype, int zero_dtype, int bias_dtype, int outlier_dtype,
       int wide_columns, int copy_x, float* parts, int splits) {
  linear<BITS, T, M_TILES, CUT>(tiles, scales, zeros, bias, outlier_values, outlier_columns, outlier_rows, x, y, M, N, K,
                                groups, group_size, group_factor, shift, enter, scale_row, scale_group, zero_row,
                                zero_group, scale_dtype, zero_dtype, bias_dtype, outlier_dtype, wide_columns, copy_x,
                                parts, splits, Neighbours());
}

}  // namespace packed_decode
}  // namespace cuda
}  // namespace lowbit
