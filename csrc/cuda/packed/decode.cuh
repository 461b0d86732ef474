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
// A block has ROW_WARPS x K_WARPS warps. Warp (r, k) multiplies 16 rows of W, every K_WARPS-th tile of them. At the end
// the K_WARPS sums are added in this order. Where N is small, K is also cut into splits, whose float32 sums a second
// kernel adds in order. No order of sums depends on M: a row of y is the same in every batch.
#pragma once
#include "cuda/codes.h"
#include "cuda/packed/decode.h"
#include "cuda/packed/operands.h"

namespace lowbit {
namespace cuda {
namespace packed_decode {

constexpr int DEPTH = 2;  // tiles that a warp has on their way to its registers

// The bytes of a row of x in shared memory. With 64 bytes between, rows g and g + 1 are in different banks.
constexpr int PITCH = 2 * SLICE + 64;

// Slices of x in shared memory: while one is read, the others are on their way. Of float32, one as pieces is read, and
// one is on its way as it is.
template <DType T, int M_TILES>
constexpr int STAGES_OF = T == DType::f32 ? 1 : M_TILES == 1 ? 3 : 2;

template <DType T, int M_TILES>
int shared_bytes(int rows_of_x) {
  const int slice = PIECES_OF<T> * PITCH + (T == DType::f32 ? 4 * SLICE : 0);
  const int x = STAGES_OF<T, M_TILES> * rows_of_x * slice, sums = K_WARPS * ROWS * 8 * M_TILES * 4;
  return x > sums ? x : sums;
}

// The bytes of a pair whose columns, column and the next, are in [begin, end).
LOWBIT_DEVICE uint32_t inside(int column, int begin, int end) {
  return (column >= begin && column < end ? 0x0000FFFFu : 0u) |
         (column + 1 >= begin && column + 1 < end ? 0xFFFF0000u : 0u);
}

// Args:
//   BITS, T: of the codes; the dtype of x and y.
//   M_TILES: products that 8 rows of x take each; M <= 8 * M_TILES.
//   CUT: groups may end inside a chunk of 32 columns. Then each group's columns are multiplied with the others masked.
//   scale_row, scale_group, zero_row, zero_group: between the values of neighbouring rows and groups; 0: one for all.
//   group_factor: 2^31 / (chunks of a group), rounded up; not read where CUT.
//   copy_x: the rows of x begin at multiples of 16 bytes.
//   parts: float32 [splits, M, N], what is written instead of y where splits > 1.
template <int BITS, DType T, int M_TILES, bool CUT>
// Registers are kept for two blocks of a processor, but not where they would spill.
LOWBIT_KERNEL(THREADS, BITS <= 4 && M_TILES == 1 && T != DType::f32 && !(BITS == 3 && CUT) ? 2 : 1)
kernel(const uint8_t* tiles, const void* scales, const void* zeros, const void* bias, const void* outlier_values,
       const void* outlier_columns, const int32_t* outlier_rows, const Element<T>* x, Element<T>* y, int M, int N, int K,
       int group_size, uint32_t group_factor, int scale_row, int scale_group, int zero_row, int zero_group,
       int scale_dtype, int zero_dtype, int bias_dtype, int outlier_dtype, int wide_columns, int copy_x, float* parts,
       int splits) {
  constexpr DType OPERAND = OPERAND_OF<T>;
  using Codes = Operand<BITS, OPERAND>;
  constexpr int PIECES = PIECES_OF<T>, STAGES = STAGES_OF<T, M_TILES>, TILE_BYTES = TILE * BITS / 8;
  const int lane = thread_index() % 32, warp = thread_index() / 32, g = lane / 4, t = lane % 4;
  const int row_warp = warp % ROW_WARPS, k_warp = warp / ROW_WARPS;
  const int tile_count = (K + TILE - 1) / TILE, slices = (tile_count + K_WARPS - 1) / K_WARPS;
  int split = 0, row_block = block_index(), first_slice = 0, end_slice = slices;
  if (splits > 1) {
    const int row_blocks = (N + ROWS - 1) / ROWS;
    split = block_index() / row_blocks, row_block = block_index() % row_blocks;
    first_slice = split * slices / splits, end_slice = (split + 1) * slices / splits;
  }
  const int first_row = row_block * ROWS;
  // Rows past the last one repeat it and are not stored, so that no load needs a mask for them.
  int row[2];
  const uint8_t* codes[2];
  LOWBIT_UNROLL
  for (int half = 0; half < 2; ++half) {
    const int n = first_row + 16 * row_warp + 8 * half + g;
    row[half] = n < N ? n : N - 1;
    codes[half] = tiles + static_cast<int64_t>(row[half]) * tile_count * TILE_BYTES;
  }

  TileRow<BITS> held[DEPTH][2];
  auto fetch_weights = [&](TileRow<BITS>(&into)[2], int tile) {
    LOWBIT_UNROLL
    for (int half = 0; half < 2; ++half) into[half].fetch(codes[half] + static_cast<int64_t>(tile) * TILE_BYTES, t);
  };

  constexpr int AT_ONCE = 16 / sizeof(Element<T>);  // elements that a copy takes
  const int unsplit = PIECES * M * PITCH;           // where float32 x arrives

  // Begins to copy a slice of x; where x is not at multiples of 16 bytes, it is loaded instead.
  auto fetch_x = [&](int slice) {
    const int stage = T == DType::f32 ? unsplit : slice % STAGES * M * PITCH, first = slice * SLICE;
    constexpr int ROW_BYTES = T == DType::f32 ? 4 * SLICE : PITCH;
    if (slice < end_slice && copy_x) {
      constexpr int COPIES = SLICE / AT_ONCE;  // of a row
      const int column = thread_index() % COPIES * AT_ONCE;
      const bool beyond = first + column >= K;
      LOWBIT_ROLLED
      for (int m = thread_index() / COPIES; m < M; m += THREADS / COPIES)
        copy_async(stage + m * ROW_BYTES + static_cast<int>(sizeof(Element<T>)) * column,
                   x + (beyond ? 0 : static_cast<int64_t>(m) * K + first + column), beyond);
    } else if (slice < end_slice) {
      LOWBIT_ROLLED
      for (int i = thread_index(); i < M * SLICE; i += THREADS) {
        const int m = i / SLICE, column = i % SLICE;
        const bool beyond = first + column >= K;
        store_shared(stage + m * ROW_BYTES + static_cast<int>(sizeof(Element<T>)) * column,
                     beyond ? Element<T>(0) : load(x + static_cast<int64_t>(m) * K + first + column));
      }
    }
    commit_copies();  // one group for every slice, so that waiting can count them
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

  float sums[M_TILES][4] = {}, products[M_TILES][4] = {}, x_sums[M_TILES][4] = {};
  float scale[2] = {}, residual[2] = {};
  typename Codes::Center center[2] = {Codes::center(1 << (BITS - 1)), Codes::center(1 << (BITS - 1))};
  enum { NO_ZEROS, INTEGERS, FLOATS };
  const int kind_of_zeros = opaque(zeros == nullptr ? NO_ZEROS : zero_dtype == int(DType::u8) ? INTEGERS : FLOATS);
  const int residuals = opaque(kind_of_zeros == FLOATS);
  // Of rows of scales and zeros: where they begin, and the bytes from one group to the next.
  const char *scale_rows[2], *zero_rows[2];
  LOWBIT_UNROLL
  for (int half = 0; half < 2; ++half) {
    const int64_t scale = row[half] * scale_row, zero = row[half] * zero_row;
    scale_rows[half] = opaque(static_cast<const char*>(scales) + scale * size_of(scale_dtype));
    zero_rows[half] = opaque(static_cast<const char*>(zeros) + zero * size_of(zero_dtype));
  }
  const int scale_step = opaque(scale_group * size_of(scale_dtype));
  const int zero_step = opaque(zero_group * size_of(zero_dtype));

  // The group that is multiplied, and the chunk that the next one begins with.
  constexpr int NEVER = 1 << 30;
  int group = -1, group_end = 0;
  // Scales and zeros, as they are stored, of the group that comes next. Where groups divide slices, that is known: the
  // next one of the tile, or `across` groups further, in the next tile of this warp.
  const bool regular = !CUT && group_factor != 0 && SLICE % group_size == 0;
  const int group_chunks = !regular ? 1 : group_size < TILE ? group_size / CHUNK : CHUNKS;
  const int across = SLICE / group_size - CHUNKS / group_chunks + 1;
  int group_ahead = 0;
  uint32_t scale_ahead[2] = {}, zero_ahead[2] = {};

  auto end_group = [&]() {
    LOWBIT_UNROLL
    for (int m = 0; m < M_TILES; ++m)
      LOWBIT_UNROLL
      for (int i = 0; i < 4; ++i) {
        const float exact = fused_multiply_add(residual[i / 2], x_sums[m][i], products[m][i]);
        sums[m][i] = fused_multiply_add(scale[i / 2], exact, sums[m][i]);
        products[m][i] = x_sums[m][i] = 0.0f;
      }
  };

  auto fetch_group = [&](int next) {
    group_ahead = next;
    LOWBIT_UNROLL
    for (int half = 0; half < 2; ++half)
      scale_ahead[half] = float_bits(scale_rows[half] + static_cast<int64_t>(next) * scale_step,
                                     scale_dtype == static_cast<int>(DType::f32));
    if (kind_of_zeros == NO_ZEROS) return;
    LOWBIT_UNROLL
    for (int half = 0; half < 2; ++half) {
      const char* at = zero_rows[half] + static_cast<int64_t>(next) * zero_step;
      zero_ahead[half] = kind_of_zeros == INTEGERS ? load(reinterpret_cast<const uint8_t*>(at))
                                                   : float_bits(at, zero_dtype == static_cast<int>(DType::f32));
    }
  };

  auto begin_group = [&](int next) {
    group = next;
    LOWBIT_UNROLL
    for (int half = 0; half < 2; ++half) scale[half] = float_of(scale_ahead[half], scale_dtype);
    if (kind_of_zeros == NO_ZEROS) return;
    LOWBIT_UNROLL
    for (int half = 0; half < 2; ++half) {
      int nearest = static_cast<int>(zero_ahead[half]);
      if (kind_of_zeros == FLOATS) {
        const float zero = float_of(zero_ahead[half], zero_dtype);
        const float largest = static_cast<float>((1 << BITS) - 1);
        nearest = static_cast<int>((zero > 0.0f ? zero < largest ? zero : largest : 0.0f) + 0.5f);
        residual[half] = static_cast<float>(nearest) - zero;
      }
      center[half] = Codes::center(nearest);
    }
  };

  // Of the chunk `first` of this tile, where not CUT.
  auto enter_group = [&](int first, int tile) {
    end_group();  // before the first one, all is zero
    if (!regular) {
      fetch_group(static_cast<int>(multiply_high(2u * first, group_factor)));
      begin_group(group_ahead);
      group_end = (group + 1) * (group_size / CHUNK);
      if (group_factor == 0 || group_end * CHUNK >= K) group_end = NEVER;
      return;
    }
    begin_group(group_ahead);
    group_end = first + group_chunks;
    const bool last = group_end % CHUNKS == 0;
    if ((last ? (tile + K_WARPS) * TILE : group_end * CHUNK) < K) fetch_group(group + (last ? across : 1));
    else group_end = NEVER;
  };

  Codes operands[2] = {};

  // Adds the products of one chunk of 32 columns; where CUT, of those in [begin, end).
  auto multiply_chunk = [&](const TileRow<BITS>(&w)[2], int chunk, const Words4(&xs)[PIECES][M_TILES], int column,
                            int begin, int end) {
    LOWBIT_UNROLL
    for (int step = 0; step < 2; ++step) {
      uint32_t a[4];
      LOWBIT_UNROLL
      for (int i = 0; i < 4; ++i)
        a[i] = operands[i % 2].of(w[i % 2], chunk, 2 * step + i / 2, center[i % 2]);
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
    LOWBIT_ROLLED  // a loop is a branch: where there are no residuals, nothing of it is issued
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
  int x_row[M_TILES];
  LOWBIT_UNROLL
  for (int m = 0; m < M_TILES; ++m) x_row[m] = 8 * m + g < M ? 8 * m + g : M - 1;

  auto multiply_tile = [&](const TileRow<BITS>(&w)[2], int tile, int stage) {
    LOWBIT_UNROLL
    for (int chunk = 0; chunk < CHUNKS; ++chunk) {
      const int k = tile * TILE + chunk * CHUNK;
      if (CUT && k >= K) break;
      LOWBIT_UNROLL
      for (int half = 0; half < 2; ++half) operands[half].next_chunk(w[half], chunk);
      Words4 xs[PIECES][M_TILES];
      LOWBIT_UNROLL
      for (int piece = 0; piece < PIECES; ++piece)
        LOWBIT_UNROLL
        for (int m = 0; m < M_TILES; ++m) {
          const int column = k_warp * TILE + chunk * CHUNK + 8 * t;
          xs[piece][m] = load_shared4(stage + (piece * M + x_row[m]) * PITCH + 2 * column);
        }
      if constexpr (CUT) {
        const int end = k + CHUNK < K ? k + CHUNK : K;
        for (int next = k / group_size; next * group_size < end; ++next) {
          if (next != group) {
            end_group();
            if (group_ahead != next || group < 0) fetch_group(next);
            begin_group(next);
            if ((next + 1) * group_size < K) fetch_group(next + 1);
          }
          multiply_chunk(w, chunk, xs, k + 8 * t, next * group_size, (next + 1) * group_size);
        }
      } else {
        // Past K there are no groups, and x is zeros.
        if (chunk >= group_end - tile * CHUNKS) enter_group(tile * CHUNKS + chunk, tile);
        multiply_chunk(w, chunk, xs, 0, 0, 0);
      }
    }
  };

  // Its outliers are shared out to the splits and warps of a row.
  auto add_outliers = [&]() {
    LOWBIT_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int end = load(outlier_rows + row[half] + 1);
      for (int i = load(outlier_rows + row[half]) + split * K_WARPS + k_warp; i < end; i += splits * K_WARPS) {
        const float value = float_at(outlier_values, DType(outlier_dtype), i);
        const int column = wide_columns ? load(static_cast<const int32_t*>(outlier_columns) + i)
                                        : load(static_cast<const uint16_t*>(outlier_columns) + i);
        LOWBIT_UNROLL
        for (int m = 0; m < M_TILES; ++m)
          LOWBIT_UNROLL
          for (int j = 0; j < 2; ++j) {
            const int x_row = 8 * m + 2 * t + j;
            if (x_row < M) {
              float& sum = sums[m][2 * half + j];
              sum = fused_multiply_add(value, value_of<T>(load(x + static_cast<int64_t>(x_row) * K + column)), sum);
            }
          }
      }
    }
  };

  // Adds the sums of the K_WARPS warps in order, then the bias, unless there are other splits to add.
  auto write_result = [&]() {
    constexpr int COLUMNS = 8 * M_TILES;
    barrier();  // nobody reads x any more, and no copy is on its way
    LOWBIT_UNROLL
    for (int m = 0; m < M_TILES; ++m)
      LOWBIT_UNROLL
      for (int i = 0; i < 4; ++i) {
        const int n = 16 * row_warp + 8 * (i / 2) + g, x_row = 8 * m + 2 * t + i % 2;
        store_shared(4 * ((k_warp * COLUMNS + x_row) * ROWS + n), sums[m][i]);
      }
    barrier();
    for (int i = thread_index(); i < M * ROWS; i += THREADS) {
      const int n = first_row + i % ROWS, m = i / ROWS;
      if (n >= N) continue;
      float sum = load_shared(4 * i);
      LOWBIT_UNROLL
      for (int k = 1; k < K_WARPS; ++k) sum += load_shared(4 * (k * COLUMNS * ROWS + i));
      if (splits > 1) {
        store(parts + (static_cast<int64_t>(split) * M + m) * N + n, sum);
        continue;
      }
      if (bias != nullptr) sum += float_at(bias, DType(bias_dtype), n);
      store(y + static_cast<int64_t>(m) * N + n, rounded_to<T>(sum));
    }
  };

  LOWBIT_UNROLL
  for (int d = 0; d < DEPTH; ++d) {
    const int tile = (first_slice + d) * K_WARPS + k_warp;
    if (first_slice + d < end_slice && tile < tile_count) fetch_weights(held[d], tile);
  }
  constexpr int AHEAD = T == DType::f32 ? 1 : STAGES - 1;
  const int first_column = first_slice * SLICE + k_warp * TILE;
  if (regular && first_column < K) fetch_group(first_column / group_size);
  for (int d = 0; d < AHEAD; ++d) fetch_x(first_slice + d);
  if (outlier_values != nullptr) add_outliers();
  for (int first = first_slice; first < end_slice; first += DEPTH) {
    LOWBIT_UNROLL
    for (int d = 0; d < DEPTH; ++d) {
      const int slice = first + d, tile = slice * K_WARPS + k_warp;
      if (slice >= end_slice) break;
      wait_copies<AHEAD - 1>();
      barrier();  // the slice is there for all threads, and nobody reads the one before it any more
      if constexpr (T == DType::f32) {
        split_x();
        barrier();  // the pieces are there for all threads
      }
      fetch_x(slice + AHEAD);
      if (tile < tile_count) multiply_tile(held[d], tile, slice % STAGES * M * PITCH);
      if (slice + DEPTH < end_slice && tile + DEPTH * K_WARPS < tile_count)
        fetch_weights(held[d], tile + DEPTH * K_WARPS);
    }
  }
  end_group();
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

}  // namespace packed_decode
}  // namespace cuda
}  // namespace lowbit
