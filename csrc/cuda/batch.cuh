// Many rows of x times a weight: the batch kernels of all families. What a family adds is how codes become operands, and
// what its groups have.
//
// As in cuda/decode.cuh, 16 rows of W are the left operand of mma.sync, 8 rows of x the right one, and the columns of both
// are read in the order in which 16 bytes of a plane hold them.
//
// A block has 256 rows of W and 32 or 64 rows of x. Each of its 8 warps multiplies 32 rows of W with all these rows of
// x, so a weight becomes an operand once for 64 rows. K goes by in chunks of 32 columns. The scale multiplies the float32
// sum of a chunk, which is added to the sum of the row: the sums of a chunk live for two products only, so registers hold
// the sums of the elements of y once, and not twice.
//
// x comes by cp.async into a ring of slices in shared memory, with pairs of rows swizzled, so that a load of 16 bytes
// by 32 threads has no bank conflict. Such a load is as wide as ldmatrix.x4 and gives the columns in the order of the
// codes, which ldmatrix does not.
//
// Weights come into the ring too, where registers have no room for what must be on its way. Each thread copies the bytes
// that it will read itself, to a place of its own: no barrier, no swizzle, no bank conflict.
//
// The grid is plain: x tiles run fastest, so blocks that run together share weights in the second-level cache. Where a
// grid leaves processors idle, K is cut into splits, whose float32 sums a second kernel adds in order. No order of sums
// depends on M, if the number of splits does not.
#pragma once
#include "cuda/batch.h"
#include "cuda/codes.h"
#include "cuda/rows_of_block.cuh"

namespace lowbit {
namespace cuda {
namespace batch {

// The bytes of a pair whose columns, column and the next, are in [begin, end).
LOWBIT_DEVICE uint32_t inside(int column, int begin, int end) {
  return (column >= begin && column < end ? 0x0000FFFFu : 0u) |
         (column + 1 >= begin && column + 1 < end ? 0xFFFF0000u : 0u);
}

// What a block computes: rows of W, rows of x, a part of K.
struct Work {
  int first_row, first_x, split;
};

LOWBIT_DEVICE Work work_of(int block, int x_tiles, int row_blocks, int x_rows) {
  const int rest = block / x_tiles;
  return {rest % row_blocks * ROWS, block % x_tiles * x_rows, rest / row_blocks};
}

// What all families' kernels are given: Linear<Weight>, and how it is cut into blocks.
struct Task {
  const uint8_t* tiles;
  const uint16_t* x;
  uint16_t* y;
  float* parts;  // float32 [splits, M, N], what is written instead of y where splits > 1
  const void* bias;
  const void* outlier_values;
  const void* outlier_columns;
  const int32_t* outlier_rows;
  int M, N, K, group_size, bias_dtype, outlier_dtype, wide_columns;
  int copy_x;  // the rows of x begin at multiples of 16 bytes
  int splits;
  int stages;  // slices in the ring, 2 or 3: one is read, the others are on their way
};

// The rows of W and of x of a thread.
struct Share {
  Work work;
  int warp, g, t;
  int row[ROW_TILES][2];  // rows past the last one repeat it and are not stored, so that no load needs a mask for them
};

template <int M_TILES>
using Sums = float[ROW_TILES][M_TILES][4];

// Args:
//   BITS, T: of the codes; the dtype of x and y.
//   M_TILES: products that the rows of x of a block take: 8 rows each.
//   CUT: groups may end inside a chunk. Then it is multiplied once for each group that it has columns of, with the others
//     masked.
//   RESERVED: bytes at the beginning of shared memory that are the family's.
//   family: begin(share, end of the ring): before the first barrier;
//     fetch_group(share, group): begins to load what the group has; enter_group(share, group): that is used from now on;
//     end_group(share, group, sums): after its last column;
//     scale[r][half]: of the group that was entered; operand(codes, r, half): of a pair of codes.
//   rows_of: the rows of x and y that the block multiplies.
template <int BITS, DType T, int M_TILES, bool CUT, int RESERVED, class Family, class RowsOf = Neighbours>
LOWBIT_DEVICE void linear(const Task& task, Family& family, const RowsOf& rows_of = {}) {
  using S = Shared<BITS, M_TILES, RESERVED>;
  constexpr int X_ROWS = 8 * M_TILES, WIDE = S::WIDE;
  constexpr int SIDE = 2;  // products of 8 rows of x that are made side by side
  const int M = task.M, N = task.N, K = task.K, group_size = task.group_size, splits = task.splits;
  const uint16_t* const x = task.x;
  const int lane = thread_index() % 32, warp = thread_index() / 32, g = lane / 4, t = lane % 4;
  const Work work = work_of(rows_of.block(), (M + X_ROWS - 1) / X_ROWS, (N + ROWS - 1) / ROWS, X_ROWS);
  const int x_rows = M - work.first_x;  // that there are
  const int tile_count = (K + TILE - 1) / TILE;
  const int first_tile = static_cast<int>(static_cast<int64_t>(work.split) * tile_count / splits);
  const int end_tile = static_cast<int>(static_cast<int64_t>(work.split + 1) * tile_count / splits);
  const int end_column = end_tile * TILE < K ? end_tile * TILE : K;
  const int end_slice = (end_column + SLICE - 1) / SLICE;
  const int first_row = work.first_row + WARP_ROWS * warp;  // of the warp
  const bool rows_exist = first_row < N;

  Share share = {work, warp, g, t, {}};
  int(&row)[ROW_TILES][2] = share.row;
  LOWBIT_UNROLL
  for (int i = 0; i < 2 * ROW_TILES; ++i) {
    const int n = first_row + 8 * i + g;
    row[i / 2][i % 2] = n < N ? n : N - 1;
  }

  // Into shared memory: the codes of a slice.
  auto fetch_weights = [&](int slice, int stage) {
    const int tile = slice / (TILE / SLICE), half = slice % (TILE / SLICE), to = S::TILES + tile % 2 * S::TILE_BYTES;
    LOWBIT_UNROLL
    for (int i = 0; i < S::COPIES; ++i) {
      const uint8_t* from = task.tiles + (static_cast<int64_t>(row[i / 2][i % 2]) * tile_count + tile) * (TILE * BITS / 8);
      LOWBIT_UNROLL
      for (int p = 0; p < WIDE; ++p)
        copy_async(stage + S::X_BYTES + 16 * ((WIDE * i + p) * THREADS + thread_index()),
                   from + 64 * (WIDE * half + p) + 16 * t, false);
      if (half > 0) continue;
      if constexpr (S::PAIRS)
        copy_async(to + 16 * (i * THREADS + thread_index()), from + 128 * WIDE + 16 * t, false);
      if constexpr (S::OCTETS)
        copy_async8(to + S::OCTETS_AT + 8 * (i * THREADS + thread_index()), from + 64 * (BITS / 2) + 8 * t);
    }
  };

  // From there: what one row's codes of the chunk at column k are in.
  struct Held {
    Words4 wide, pairs;
    Words2 octets;
  };
  auto load_codes = [&](int i, int k, int stage) {
    Held held = {};
    const int from = S::TILES + k / TILE % 2 * S::TILE_BYTES, part = WIDE == 2 ? k / (SLICE / 2) % 2 : 0;
    if constexpr (WIDE > 0)
      held.wide = load_shared4(stage + S::X_BYTES + 16 * ((WIDE * i + part) * THREADS + thread_index()));
    if constexpr (S::PAIRS) held.pairs = load_shared4(from + 16 * (i * THREADS + thread_index()));
    if constexpr (S::OCTETS) held.octets = load_shared2(from + S::OCTETS_AT + 8 * (i * THREADS + thread_index()));
    return held;
  };

  // stage: the address of a slice. Rows of x that are not there, and columns past K, are zeros. Odd rows have the halves
  // of 128 bytes exchanged.
  auto fetch_x = [&](int slice, int stage) {
    const int first = slice * SLICE;
    if (task.copy_x) {
      LOWBIT_UNROLL
      for (int i = 0; i < X_ROWS * (SLICE / 8) / THREADS; ++i) {
        const int m = (THREADS * i + thread_index()) / (SLICE / 8), column = thread_index() % (SLICE / 8) * 8;
        const bool beyond = first + column >= K || m >= x_rows;
        copy_async(stage + m * PITCH + ((2 * column) ^ (m % 2 * 64)),
                   x + (beyond ? 0 : rows_of.of_x(work.first_x + m) * K + first + column), beyond);
      }
    } else {
      LOWBIT_ROLLED
      for (int i = thread_index(); i < X_ROWS * SLICE; i += THREADS) {
        const int m = i / SLICE, column = i % SLICE;
        const bool beyond = first + column >= K || m >= x_rows;
        store_shared(stage + m * PITCH + ((2 * column) ^ (m % 2 * 64)),
                     beyond ? uint16_t(0) : load(x + rows_of.of_x(work.first_x + m) * K + first + column));
      }
    }
  };

  auto fetch_slice = [&](int slice, int stage) {
    if (slice < end_slice) {
      fetch_weights(slice, stage);
      fetch_x(slice, stage);
    }
    commit_copies();  // one group for every slice, so that waiting can count them
  };

  Sums<M_TILES> sums = {};
  const int first_group = first_tile * TILE / group_size;
  int group = first_group - 1, group_end = first_group * group_size;

  // What a group has is loaded while the one before is multiplied.
  auto fetch_group = [&](int next) {
    if (static_cast<int64_t>(next) * group_size < K) family.fetch_group(share, next);
  };

  auto enter_group_of = [&](int k) {
    if (k < group_end) return;
    if (group >= first_group) family.end_group(share, group, sums);
    ++group;
    group_end += group_size;
    family.enter_group(share, group);
    fetch_group(group + 1);
  };

  // The operands of the chunk that begins at column k; where CUT, of columns begin .. end - 1 alone.
  auto to_operands = [&](uint32_t(&a)[ROW_TILES][2][4], int k, int stage, int begin, int end) {
    LOWBIT_UNROLL
    for (int i = 0; i < 2 * ROW_TILES; ++i) {
      const Held held = load_codes(i, k, stage);
      LOWBIT_UNROLL
      for (int pair = 0; pair < 4; ++pair) {
        const uint32_t widest = word(WIDE > 0 ? held.wide : held.pairs, pair), above = word(held.pairs, pair);
        const uint32_t codes = pair_of_codes<BITS>(widest, above, held.octets, k / CHUNK % (TILE / CHUNK), pair);
        uint32_t& operand = a[i / 2][pair / 2][2 * (pair % 2) + i % 2];
        operand = family.operand(codes, i / 2, i % 2);
        if constexpr (CUT) operand &= inside(k + 8 * t + 2 * pair, begin, end);
      }
    }
  };

  // sums += scale * (a @ x.T) for a chunk
  auto multiply = [&](const uint32_t(&a)[ROW_TILES][2][4], int k, int stage) {
    const int at = stage + g * PITCH + ((k % SLICE * 2 + 16 * t) ^ (g % 2 * 64));
    LOWBIT_UNROLL
    for (int first = 0; first < M_TILES; first += SIDE) {
      float products[SIDE][ROW_TILES][4] = {};
      Words4 xs[SIDE];
      LOWBIT_UNROLL
      for (int m = 0; m < SIDE; ++m) xs[m] = load_shared4(at + 8 * (first + m) * PITCH);
      LOWBIT_UNROLL
      for (int step = 0; step < 2; ++step)
        LOWBIT_UNROLL
        for (int m = 0; m < SIDE; ++m)
          LOWBIT_UNROLL
          for (int r = 0; r < ROW_TILES; ++r) {
            const uint32_t(&left)[4] = a[r][step];
            multiply_matrices<T>(products[m][r], left[0], left[1], left[2], left[3], word(xs[m], 2 * step),
                                 word(xs[m], 2 * step + 1));
          }
      LOWBIT_UNROLL
      for (int m = 0; m < SIDE; ++m)
        LOWBIT_UNROLL
        for (int r = 0; r < ROW_TILES; ++r)
          LOWBIT_UNROLL
          for (int i = 0; i < 4; ++i) {
            float& sum = sums[r][first + m][i];
            sum = fused_multiply_add(family.scale[r][i / 2], products[m][r][i], sum);
          }
    }
  };

  auto multiply_chunk = [&](int k, int stage) {
    uint32_t a[ROW_TILES][2][4];
    const int end = k + CHUNK < K ? k + CHUNK : K;
    for (int begin = k; begin < end; begin = group_end) {
      enter_group_of(begin);
      to_operands(a, k, stage, begin, group_end);
      multiply(a, k, stage);
      if constexpr (!CUT) break;
    }
  };

  // The splits share out the outliers of a row.
  auto add_outliers = [&]() {
    LOWBIT_UNROLL
    for (int r = 0; r < ROW_TILES; ++r)
      LOWBIT_UNROLL
      for (int half = 0; half < 2; ++half) {
        const int end = load(task.outlier_rows + row[r][half] + 1);
        for (int i = load(task.outlier_rows + row[r][half]) + work.split; i < end; i += splits) {
          const float value = float_at(task.outlier_values, DType(task.outlier_dtype), i);
          const int column = task.wide_columns ? load(static_cast<const int32_t*>(task.outlier_columns) + i)
                                          : load(static_cast<const uint16_t*>(task.outlier_columns) + i);
          LOWBIT_UNROLL
          for (int m = 0; m < M_TILES; ++m)
            LOWBIT_UNROLL
            for (int j = 0; j < 2; ++j) {
              const int x_row = 8 * m + 2 * t + j;
              if (x_row >= x_rows) continue;
              const uint16_t bits = load(x + rows_of.of_x(work.first_x + x_row) * K + column);
              float& sum = sums[r][m][2 * half + j];
              sum = fused_multiply_add(value, to_float<T>(bits), sum);
            }
        }
      }
  };

  // Through shared memory, so that neighbouring threads store neighbouring columns of y. Each has one column.
  auto write_result = [&]() {
    barrier();  // nobody reads x any more, and no copy is on its way
    LOWBIT_UNROLL
    for (int r = 0; r < ROW_TILES; ++r)
      LOWBIT_UNROLL
      for (int m = 0; m < M_TILES; ++m)
        LOWBIT_UNROLL
        for (int i = 0; i < 4; ++i) {
          const int n = WARP_ROWS * warp + 16 * r + 8 * (i / 2) + g, x_row = 8 * m + 2 * t + i % 2;
          store_shared(4 * (x_row * SUMS_PITCH + n), sums[r][m][i]);
        }
    barrier();
    const int n = work.first_row + thread_index();
    if (n >= N) return;
    const float offset = task.bias != nullptr && splits == 1 ? float_at(task.bias, DType(task.bias_dtype), n) : 0.0f;
    for (int m = 0; m < X_ROWS && m < x_rows; ++m) {
      const float sum = load_shared(4 * (m * SUMS_PITCH + thread_index()));
      const int64_t x_row = work.first_x + m;
      if (splits > 1)
        store(task.parts + (static_cast<int64_t>(work.split) * M + x_row) * N + n, sum);
      else
        store(task.y + rows_of.of_y(x_row) * N + n, from_float<T>(sum + offset));
    }
  };

  const int first_column = first_tile * TILE;
  const int end_stage = S::STAGES + task.stages * S::STAGE_BYTES;
  int stage = S::STAGES, free_stage = stage;  // that is read; that is written next
  auto advance = [&](int& which) { which = which + S::STAGE_BYTES < end_stage ? which + S::STAGE_BYTES : S::STAGES; };
  for (int d = 0; d < task.stages - 1; ++d) {
    fetch_slice(first_column / SLICE + d, free_stage);
    advance(free_stage);
  }
  family.begin(share, end_stage);
  fetch_group(first_group);
  if (rows_exist && task.outlier_values != nullptr) add_outliers();
  LOWBIT_ROLLED
  for (int k = first_column; k < end_column; k += CHUNK) {
    if (k % SLICE == 0) {
      if (task.stages > 2)
        wait_copies<1>();
      else
        wait_copies<0>();
      barrier();  // the slice is there for all threads, and nobody reads the one before it any more
      fetch_slice(k / SLICE + task.stages - 1, free_stage);
      advance(free_stage);
    }
    if (rows_exist) multiply_chunk(k, stage);
    if (k % SLICE == SLICE - CHUNK) advance(stage);
  }
  if (rows_exist && (group_end == end_column || end_column == K)) family.end_group(share, group, sums);  // else the next split ends it
  write_result();
}

// y = parts.sum(0) + bias, in the order of the splits.
template <DType T>
LOWBIT_KERNEL(THREADS, 1)
add_splits(const float* parts, const void* bias, uint16_t* y, int M, int N, int splits, int bias_dtype) {
  const int64_t i = static_cast<int64_t>(block_index()) * THREADS + thread_index(), count = static_cast<int64_t>(M) * N;
  if (i >= count) return;
  float sum = load(parts + i);
  for (int split = 1; split < splits; ++split) sum += load(parts + split * count + i);
  if (bias != nullptr) sum += float_at(bias, DType(bias_dtype), i % N);
  store(y + i, from_float<T>(sum));
}

}  // namespace batch
}  // namespace cuda
}  // namespace lowbit
