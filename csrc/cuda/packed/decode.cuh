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
LOWBIT_KERNEL(THREADS, BITS <= 4 && M_TILES == 1 && T != DType::f32 ? 2 : 1)
kernel(const uint8_t* tiles, const void* scales, const void* zeros, const void* bias, const void* outlier_values,
       const void* outlier_columns, const int32_t* outlier_rows, const Element<T>* x, Element<T>* y, int M, int N, int K,
       int group_size, uint32_t group_factor, int scale_row, int scale_group, int zero_row, int zero_group,
       int scale_dtype, int zero_dtype, int bias_dtype, int outlier_dtype, int wide_columns, int copy_x, float* parts,
       int splits) {
  constexpr DType OPERAND = OPERAND_OF<T>;
  constexpr int PIECES = PIECES_OF<T>, STAGES = STAGES_OF<T, M_TILES>, TILE_BYTES = TILE * BITS / 8;
  const int lane = thread_index() % 32, warp = thread_index() / 32, g = lane / 4, t = lane % 4;
  const int row_warp = warp % ROW_WARPS, k_warp = warp / ROW_WARPS;
  const int tile_count = (K + TILE - 1) / TILE, slices = (tile_count + K_WARPS - 1) / K_WARPS;
  const int row_blocks = (N + ROWS - 1) / ROWS, split = block_index() / row_blocks;
  const int first_row = block_index() % row_blocks * ROWS;
  const int first_slice = split * slices / splits, end_slice = (split + 1) * slices / splits;
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
      for (int i = thread_index(); i < M * (SLICE / AT_ONCE); i += THREADS) {
        const int m = i / (SLICE / AT_ONCE), column = i % (SLICE / AT_ONCE) * AT_ONCE;
        const bool beyond = first + column >= K;
        copy_async(stage + m * ROW_BYTES + static_cast<int>(sizeof(Element<T>)) * column,
                   x + (beyond ? 0 : static_cast<int64_t>(m) * K + first + column), beyond);
      }
    } else if (slice < end_slice) {
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
  uint32_t center[2] = {};
  const bool residuals = zeros != nullptr && DType(zero_dtype) != DType::u8;
  int group = -1;

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

  auto enter_group = [&](int next) {
    if (next == group) return;
    if (group >= 0) end_group();
    group = next;
    LOWBIT_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int64_t n = row[half];
      scale[half] = float_at(scales, DType(scale_dtype), n * scale_row + static_cast<int64_t>(group) * scale_group);
      int nearest = 1 << (BITS - 1);
      if (zeros != nullptr) {
        const float zero = float_at(zeros, DType(zero_dtype), n * zero_row + static_cast<int64_t>(group) * zero_group);
        const float largest = static_cast<float>((1 << BITS) - 1);
        nearest = static_cast<int>((zero > 0.0f ? zero < largest ? zero : largest : 0.0f) + 0.5f);
        residual[half] = static_cast<float>(nearest) - zero;
      }
      center[half] = Centered<BITS, OPERAND>::prepare(nearest);
    }
  };

  // Adds the products of one chunk of 32 columns; where CUT, of those in [begin, end).
  auto multiply_chunk = [&](const TileRow<BITS>(&w)[2], int chunk, const Words4(&xs)[PIECES][M_TILES], int column,
                            int begin, int end) {
    LOWBIT_UNROLL
    for (int step = 0; step < 2; ++step) {
      uint32_t a[4], ones[2];
      LOWBIT_UNROLL
      for (int i = 0; i < 4; ++i)
        a[i] = Centered<BITS, OPERAND>::to_operand(w[i % 2].codes(chunk, 2 * step + i / 2), center[i % 2]);
      LOWBIT_UNROLL
      for (int i = 0; i < 2; ++i) {
        ones[i] = OPERAND == DType::f16 ? 0x3C003C00u : 0x3F803F80u;
        if constexpr (CUT) {
          const uint32_t mask = inside(column + 4 * step + 2 * i, begin, end);
          ones[i] &= mask, a[2 * i] &= mask, a[2 * i + 1] &= mask;
        }
      }
      LOWBIT_UNROLL
      for (int piece = PIECES - 1; piece >= 0; --piece)
        LOWBIT_UNROLL
        for (int m = 0; m < M_TILES; ++m) {
          const uint32_t b0 = word(xs[piece][m], 2 * step), b1 = word(xs[piece][m], 2 * step + 1);
          multiply_matrices<OPERAND>(products[m], a[0], a[1], a[2], a[3], b0, b1);
          if (residuals) multiply_matrices<OPERAND>(x_sums[m], ones[0], ones[0], ones[1], ones[1], b0, b1);
        }
    }
  };

  auto multiply_tile = [&](const TileRow<BITS>(&w)[2], int tile, int stage) {
    LOWBIT_UNROLL
    for (int chunk = 0; chunk < TILE / CHUNK; ++chunk) {
      const int k = tile * TILE + chunk * CHUNK;
      if (k >= K) break;
      Words4 xs[PIECES][M_TILES] = {};  // rows of x that are not there are zeros
      LOWBIT_UNROLL
      for (int piece = 0; piece < PIECES; ++piece)
        LOWBIT_UNROLL
        for (int m = 0; m < M_TILES; ++m)
          if (8 * m + g < M) {
            const int column = k_warp * TILE + chunk * CHUNK + 8 * t;
            xs[piece][m] = load_shared4(stage + (piece * M + 8 * m + g) * PITCH + 2 * column);
          }
      if constexpr (CUT) {
        const int end = k + CHUNK < K ? k + CHUNK : K;
        for (int next = k / group_size; next * group_size < end; ++next) {
          enter_group(next);
          multiply_chunk(w, chunk, xs, k + 8 * t, next * group_size, (next + 1) * group_size);
        }
      } else {
        enter_group(static_cast<int>(multiply_high(2u * (k / CHUNK), group_factor)));
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
  if (group >= 0) end_group();
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
