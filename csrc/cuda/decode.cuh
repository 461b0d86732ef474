// What the decode kernels of the families with packed codes share: everything but how weights become operands.
//
// A block has ROW_WARPS x K_WARPS warps. Warp (r, k) multiplies 16 rows of W, every K_WARPS-th tile of them. Slices of
// x come to shared memory ahead of their use, tiles straight to registers. At the end the K_WARPS sums are added in
// this order. Where N is small, K is also cut into splits, whose float32 sums a second kernel adds in order. No order
// of sums depends on M: a row of y is the same in every batch.
#pragma once
#include "cuda/codes.h"
#include "cuda/decode.h"
#include "cuda/rows_of_block.cuh"

namespace lowbit {
namespace cuda {
namespace decode {

constexpr int DEPTH = 2;  // tiles that a warp has on their way to its registers

// The part of a product that a thread has.
struct Share {
  int lane, g, t, row_warp, k_warp;
  int split, first_row, tile_count, first_slice, end_slice;
  int row[2];  // g and g + 8 of its warp; rows past the last one repeat it, so that no load needs a mask for them
};

template <class RowsOf = Neighbours>
LOWBIT_DEVICE Share share(int N, int K, int splits, const RowsOf& rows_of = {}) {
  Share s;
  const int warp = thread_index() / 32, row_blocks = (N + ROWS - 1) / ROWS;
  s.lane = thread_index() % 32, s.g = s.lane / 4, s.t = s.lane % 4;
  s.row_warp = warp % ROW_WARPS, s.k_warp = warp / ROW_WARPS;
  s.split = rows_of.block() / row_blocks, s.first_row = rows_of.block() % row_blocks * ROWS;
  s.tile_count = (K + TILE - 1) / TILE;
  const int slices = (s.tile_count + K_WARPS - 1) / K_WARPS;
  s.first_slice = s.split * slices / splits, s.end_slice = (s.split + 1) * slices / splits;
  LOWBIT_UNROLL
  for (int half = 0; half < 2; ++half) {
    const int n = s.first_row + 16 * s.row_warp + 8 * half + s.g;
    s.row[half] = n < N ? n : N - 1;
  }
  return s;
}

// The slices of x, of elements E, in shared memory, from its byte `begin` on. Where rows of x begin at no multiple of 16
// bytes (copy is false), threads carry them there.
template <int M_TILES, class E = uint16_t, class RowsOf = Neighbours>
struct Slices {
  static constexpr int STAGES = STAGES_OF<M_TILES, E>, PITCH = PITCH_OF<E>;
  static constexpr int SIZE = sizeof(E), AT_ONCE = 16 / SIZE;  // of an element; elements that a copy takes
  const E* x;
  int M, K, begin, end_slice;
  bool copy;
  RowsOf rows_of = {};

  LOWBIT_DEVICE int stage(int slice) const { return begin + slice % STAGES * M * PITCH; }

  LOWBIT_DEVICE void fetch(int slice) const {
    const int to = stage(slice), first = slice * SLICE;
    if (slice < end_slice && copy) {
      for (int i = thread_index(); i < M * (SLICE / AT_ONCE); i += THREADS) {
        const int m = i / (SLICE / AT_ONCE), column = i % (SLICE / AT_ONCE) * AT_ONCE;
        const bool beyond = first + column >= K;
        copy_async(to + m * PITCH + SIZE * column, x + (beyond ? 0 : rows_of.of_x(m) * K + first + column),
                   beyond);
      }
    } else if (slice < end_slice) {
      for (int i = thread_index(); i < M * SLICE; i += THREADS) {
        const int m = i / SLICE, column = i % SLICE;
        const bool beyond = first + column >= K;
        store_shared(to + m * PITCH + SIZE * column,
                     beyond ? E(0) : load(x + rows_of.of_x(m) * K + first + column));
      }
    }
    commit_copies();  // one group for every slice, so that waiting can count them
  }

  // Columns `column` .. column + 7 of row 8m + g, for each m; rows that are not there are zeros.
  LOWBIT_DEVICE void read(Words4 (&xs)[M_TILES], int stage, int column, int g) const {
    LOWBIT_UNROLL
    for (int m = 0; m < M_TILES; ++m) {
      xs[m] = Words4{};
      if (8 * m + g < M) xs[m] = load_shared4(stage + (8 * m + g) * PITCH + 2 * column);
    }
  }
};

// The main loop: multiply(rows of the tile, its number, where its slice is) for every tile of the warp. Tiles and
// slices are fetched ahead; meanwhile() runs while the first ones are on their way.
template <int BITS, class SlicesOfX, class Meanwhile, class Multiply>
LOWBIT_DEVICE void for_each_tile(const Share& s, const uint8_t* tiles, const SlicesOfX& slices, Meanwhile meanwhile,
                                 Multiply multiply) {
  constexpr int STAGES = SlicesOfX::STAGES, TILE_BYTES = TILE * BITS / 8;
  const uint8_t* rows[2];
  LOWBIT_UNROLL
  for (int half = 0; half < 2; ++half)
    rows[half] = tiles + static_cast<int64_t>(s.row[half]) * s.tile_count * TILE_BYTES;
  TileRow<BITS> held[DEPTH][2];
  auto fetch_weights = [&](TileRow<BITS>(&into)[2], int tile) {
    LOWBIT_UNROLL
    for (int half = 0; half < 2; ++half) into[half].fetch(rows[half] + static_cast<int64_t>(tile) * TILE_BYTES, s.t);
  };

  LOWBIT_UNROLL
  for (int d = 0; d < DEPTH; ++d) {
    const int tile = (s.first_slice + d) * K_WARPS + s.k_warp;
    if (s.first_slice + d < s.end_slice && tile < s.tile_count) fetch_weights(held[d], tile);
  }
  for (int d = 0; d < STAGES - 1; ++d) slices.fetch(s.first_slice + d);
  meanwhile();
  for (int first = s.first_slice; first < s.end_slice; first += DEPTH) {
    LOWBIT_UNROLL
    for (int d = 0; d < DEPTH; ++d) {
      const int slice = first + d, tile = slice * K_WARPS + s.k_warp;
      if (slice >= s.end_slice) break;
      wait_copies<STAGES - 2>();
      barrier();  // the slice is there for all threads, and nobody reads the one before it any more
      slices.fetch(slice + STAGES - 1);
      if (tile < s.tile_count) multiply(held[d], tile, slices.stage(slice));
      if (slice + DEPTH < s.end_slice && tile + DEPTH * K_WARPS < s.tile_count)
        fetch_weights(held[d], tile + DEPTH * K_WARPS);
    }
  }
}

// Sparse weights besides the codes, in CSR form.
struct Sparse {
  const void *values, *columns;
  const int32_t* rows;
  int dtype, wide;
};

// sums += outliers @ x.T. The outliers of a row are shared out to its splits and warps.
template <DType T, int M_TILES, class RowsOf = Neighbours>
LOWBIT_DEVICE void add_outliers(const Share& s, const Sparse& outliers, const Element<T>* x, int M, int K, int splits,
                                float (&sums)[M_TILES][4], const RowsOf& rows_of = {}) {
  if (outliers.values == nullptr) return;
  LOWBIT_UNROLL
  for (int half = 0; half < 2; ++half) {
    const int end = load(outliers.rows + s.row[half] + 1);
    for (int i = load(outliers.rows + s.row[half]) + s.split * K_WARPS + s.k_warp; i < end; i += splits * K_WARPS) {
      const float value = float_at(outliers.values, DType(outliers.dtype), i);
      const int column = outliers.wide ? load(static_cast<const int32_t*>(outliers.columns) + i)
                                       : load(static_cast<const uint16_t*>(outliers.columns) + i);
      LOWBIT_UNROLL
      for (int m = 0; m < M_TILES; ++m)
        LOWBIT_UNROLL
        for (int j = 0; j < 2; ++j) {
          const int x_row = 8 * m + 2 * s.t + j;
          if (x_row < M) {
            float& sum = sums[m][2 * half + j];
            sum = fused_multiply_add(value, value_of<T>(load(x + rows_of.of_x(x_row) * K + column)), sum);
          }
        }
    }
  }
}

// Adds the sums of the K_WARPS warps in order, in shared memory from its byte `begin` on, then the bias: y; or, where
// there are other splits to add, the part of this one.
template <DType T, int M_TILES, class RowsOf = Neighbours>
LOWBIT_DEVICE void write_result(const Share& s, const float (&sums)[M_TILES][4], int begin, const void* bias,
                                int bias_dtype, Element<T>* y, float* parts, int splits, int M, int N,
                                const RowsOf& rows_of = {}) {
  constexpr int COLUMNS = 8 * M_TILES;
  barrier();  // nobody reads x any more, and no copy is on its way
  LOWBIT_UNROLL
  for (int m = 0; m < M_TILES; ++m)
    LOWBIT_UNROLL
    for (int i = 0; i < 4; ++i) {
      const int n = 16 * s.row_warp + 8 * (i / 2) + s.g, x_row = 8 * m + 2 * s.t + i % 2;
      store_shared(begin + 4 * ((s.k_warp * COLUMNS + x_row) * ROWS + n), sums[m][i]);
    }
  barrier();
  for (int i = thread_index(); i < M * ROWS; i += THREADS) {
    const int n = s.first_row + i % ROWS, m = i / ROWS;
    if (n >= N) continue;
    float sum = load_shared(begin + 4 * i);
    LOWBIT_UNROLL
    for (int k = 1; k < K_WARPS; ++k) sum += load_shared(begin + 4 * (k * COLUMNS * ROWS + i));
    if (splits > 1) {
      store(parts + (static_cast<int64_t>(s.split) * M + m) * N + n, sum);
      continue;
    }
    if (bias != nullptr) sum += float_at(bias, DType(bias_dtype), n);
    store(y + rows_of.of_y(m) * N + n, rounded_to<T>(sum));
  }
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

// Starts add_splits, where there are splits.
template <DType T, class Weight>
int launch_sum(const Linear<Weight>& call, const float* parts, int splits, Stream stream) {
  if (splits == 1) return 0;
  const int blocks = static_cast<int>((call.M * call.weight.N + THREADS - 1) / THREADS);
  return launch(&add_splits<T>, blocks, THREADS, 0, stream, parts, call.bias, static_cast<Element<T>*>(call.y), call.M,
                call.weight.N, splits, static_cast<int>(call.bias_dtype));
}

// The bytes of a pair whose columns, column and the next, are in [begin, end).
LOWBIT_DEVICE uint32_t inside(int column, int begin, int end) {
  return (column >= begin && column < end ? 0x0000FFFFu : 0u) |
         (column + 1 >= begin && column + 1 < end ? 0xFFFF0000u : 0u);
}

}  // namespace decode
}  // namespace cuda
}  // namespace lowbit
