// Many rows of x, as int8, times a weight of the family `packed`: the PyTorch lines of packed/decode_int8.cuh, for any M.
//
// 16 rows of W by 8 rows of x by 32 columns are one product of bytes, as there. The sums of q of each group, which its
// zero multiplies, come from the kernel before (sum_groups).
//
// A block has 128 rows of W and 32 or 64 rows of x. Each of its 4 warps multiplies 32 rows of W with all these rows of x,
// so that codes become bytes once for 64 rows. The int32 sums of a group are in registers beside the float32 sums.
//
// x and codes come by cp.async into a ring in shared memory, a tile of 256 columns a stage. Of codes each thread copies the
// bytes that it will read itself, to a place of its own: no swizzle, no bank conflict.
//
// The grid is plain: x tiles run fastest, so blocks that run together share weights in the second-level cache. Where a
// grid leaves processors idle, K is cut into splits, which add_splits() of quantize.cuh adds in order. No order of sums
// depends on M, if the number of splits does not.
#pragma once
#include "cuda/int8.cuh"
#include "cuda/packed/batch_int8.h"
#include "cuda/packed/operands.h"

namespace lowbit {
namespace cuda {
namespace packed_batch_int8 {

// The codes of one row of W that a thread multiplies next, from its part of a tile in shared memory. Here the chunk is not
// known to the compiler: int8::Bytes is for loops that are unrolled.
template <int BITS>
struct Held {
  static constexpr int WIDTH = BITS == 8 ? 8 : BITS >= 4 ? 4 : 2, FIELDS = 16 / WIDTH, PARTS = BITS / 2;
  static constexpr uint32_t EACH = 0x01010101u;
  Words4 wide, pairs;
  Words2 octets;

  // i: which of the thread's rows; at: where the stage's codes are.
  LOWBIT_DEVICE void read(int at, int i, int chunk) {
    const int mine = thread_index();
    if constexpr (BITS > 1)
      if (chunk % FIELDS == 0) wide = load_shared4(at + 16 * ((i * PARTS + chunk / FIELDS) * THREADS + mine));
    if constexpr (BITS == 6 || BITS == 7)
      if (chunk == 0) pairs = load_shared4(at + 16 * ((i * PARTS + 2) * THREADS + mine));
    if constexpr (BITS % 2)
      if (chunk == 0) octets = load_shared2(at + 16 * COPIES * PARTS * THREADS + 8 * (i * THREADS + mine));
  }

  // The bytes of lanes 8t + 4j .. 8t + 4j + 3, of a plane of this width, in which `chunk` is.
  template <int FIELD>
  LOWBIT_DEVICE static uint32_t gather(const Words4& part, int chunk, int j) {
    const uint32_t which = chunk / (8 / FIELD) % 2 ? 0x7531u : 0x6420u;
    return j ? permute_bytes(part.z, part.w, which) : permute_bytes(part.x, part.y, which);
  }

  // Columns 32 * chunk + 8t + 4j and the next three.
  LOWBIT_DEVICE uint32_t bytes(int chunk, int j) const {
    uint32_t codes = 0;
    if constexpr (BITS == 8) return gather<8>(wide, chunk, j);
    if constexpr (BITS > 1)
      codes = gather<WIDTH>(wide, chunk, j) >> chunk % (8 / WIDTH) * WIDTH & ((1u << WIDTH) - 1) * EACH;
    if constexpr (BITS == 6 || BITS == 7)
      codes |= (gather<2>(pairs, chunk, j) >> chunk % 4 * 2 & 0x03u * EACH) << 4;
    if constexpr (BITS % 2) codes |= ((j ? octets.y : octets.x) >> chunk & EACH) << (BITS - 1);
    return codes;
  }
};

// Args:
//   BITS: of the codes. M_TILES: products that the rows of x of a block take, 8 rows each.
//   CUT: groups may end inside a chunk of 32 columns. Then it is multiplied once for each group that it has columns of.
//   q, inverse, x, dtype, exact, parts, outlier_parts: as of packed/decode_int8.cuh.
//   x_sums: int32 [G, x_sums_row], sum_groups() of q.
//   unit: of Plan. stages: of the ring, 2 or 3.
template <int BITS, int M_TILES, bool CUT>
LOWBIT_KERNEL(THREADS, 2)
kernel(const uint8_t* tiles, const void* scales, const void* zeros, const void* bias, const void* outlier_values,
       const void* outlier_columns, const int32_t* outlier_rows, const int8_t* q, const float* inverse,
       const int32_t* x_sums, const void* x, void* y, int M, int N, int K, int columns, int group_size, int scale_row,
       int scale_group, int zero_row, int zero_group, int x_sums_row, int scale_dtype, int zero_dtype, int bias_dtype,
       int outlier_dtype, int wide_columns, int dtype, int exact, uint32_t* parts, float* outlier_parts, int splits,
       int unit, int stages) {
  constexpr int X_ROWS = 8 * M_TILES, X_BYTES = X_ROWS * PITCH, STAGE_BYTES = X_BYTES + ROWS * 32 * BITS;
  constexpr int PARTS = BITS / 2;
  const int lane = thread_index() % 32, warp = thread_index() / 32, g = lane / 4, t = lane % 4;
  const int x_blocks = (M + X_ROWS - 1) / X_ROWS, row_blocks = (N + ROWS - 1) / ROWS, rest = block_index() / x_blocks;
  const int first_x = block_index() % x_blocks * X_ROWS, block_row = rest % row_blocks * ROWS, split = rest / row_blocks;
  const int x_rows = M - first_x;  // that there are
  const int tile_count = columns / TILE, units = (tile_count + unit - 1) / unit;
  const int first_tile = split * units / splits * unit, past = (split + 1) * units / splits * unit;
  const int end_tile = past < tile_count ? past : tile_count;
  const int first_row = block_row + WARP_ROWS * warp;  // of the warp
  const bool rows_exist = first_row < N;
  int row[COPIES];  // rows past the last one repeat it and are not stored, so that no load needs a mask for them
  LOWBIT_UNROLL
  for (int i = 0; i < COPIES; ++i) {
    const int n = first_row + 8 * i + g;
    row[i] = n < N ? n : N - 1;
  }

  // Rows of x that are not there are zeros. Of four neighbouring rows, 32 bytes are in different banks.
  auto fetch_x = [&](int tile, int stage) {
    LOWBIT_UNROLL
    for (int i = 0; i < X_ROWS * (TILE / 16) / THREADS; ++i) {
      const int m = (THREADS * i + thread_index()) / (TILE / 16), column = thread_index() % (TILE / 16) * 16;
      const bool beyond = m >= x_rows;
      copy_async(stage + m * PITCH + (column ^ m % 4 * 32),
                 q + (beyond ? 0 : static_cast<int64_t>(first_x + m) * columns + tile * TILE + column), beyond);
    }
  };

  auto fetch_weights = [&](int tile, int stage) {
    LOWBIT_UNROLL
    for (int i = 0; i < COPIES; ++i) {
      const uint8_t* from = tiles + (static_cast<int64_t>(row[i]) * tile_count + tile) * (TILE * BITS / 8);
      LOWBIT_UNROLL
      for (int p = 0; p < PARTS; ++p)
        copy_async(stage + X_BYTES + 16 * ((i * PARTS + p) * THREADS + thread_index()), from + 64 * p + 16 * t, false);
      if constexpr (BITS % 2)
        copy_async8(stage + X_BYTES + 16 * COPIES * PARTS * THREADS + 8 * (i * THREADS + thread_index()),
                    from + 64 * PARTS + 8 * t);
    }
  };

  auto fetch_tile = [&](int tile, int stage) {
    if (tile < end_tile) {
      fetch_weights(tile, stage);
      fetch_x(tile, stage);
    }
    commit_copies();  // one group for every tile, so that waiting can count them
  };

  float sums[ROW_TILES][M_TILES][4] = {};
  int32_t products[ROW_TILES][M_TILES][4] = {};
  float scale[COPIES] = {}, residual[COPIES] = {};
  int center[COPIES];
  LOWBIT_UNROLL
  for (int i = 0; i < COPIES; ++i) center[i] = 1 << (BITS - 1);
  enum { NO_ZEROS, INTEGERS, FLOATS };
  const int kind_of_zeros = zeros == nullptr ? NO_ZEROS : zero_dtype == int(DType::u8) ? INTEGERS : FLOATS;
  const int first_group = first_tile * TILE / group_size;
  int group = first_group - 1, group_end = first_group * group_size;
  uint32_t scale_ahead[COPIES] = {}, zero_ahead[COPIES] = {};

  // Begins to load what a group has.
  auto fetch_group = [&](int next) {
    if (static_cast<int64_t>(next) * group_size >= K) return;
    LOWBIT_UNROLL
    for (int i = 0; i < COPIES; ++i) {
      const int64_t at = row[i] * static_cast<int64_t>(scale_row) + static_cast<int64_t>(next) * scale_group;
      scale_ahead[i] = float_bits(static_cast<const char*>(scales) + at * size_of(scale_dtype),
                                  scale_dtype == static_cast<int>(DType::f32));
      if (kind_of_zeros == NO_ZEROS) continue;
      const int64_t zero_at = row[i] * static_cast<int64_t>(zero_row) + static_cast<int64_t>(next) * zero_group;
      const char* const zero = static_cast<const char*>(zeros) + zero_at * size_of(zero_dtype);
      zero_ahead[i] = kind_of_zeros == INTEGERS ? load(reinterpret_cast<const uint8_t*>(zero))
                                                : float_bits(zero, zero_dtype == static_cast<int>(DType::f32));
    }
  };

  auto begin_group = [&]() {
    LOWBIT_UNROLL
    for (int i = 0; i < COPIES; ++i) {
      scale[i] = float_of(scale_ahead[i], scale_dtype);
      if (kind_of_zeros == NO_ZEROS) continue;
      center[i] = static_cast<int>(zero_ahead[i]);
      if (kind_of_zeros == FLOATS) {
        const float zero = float_of(zero_ahead[i], zero_dtype), largest = static_cast<float>((1 << BITS) - 1);
        center[i] = static_cast<int>((zero > 0.0f ? zero < largest ? zero : largest : 0.0f) + 0.5f);
        residual[i] = static_cast<float>(center[i]) - zero;
      }
    }
  };

  // Of the group's columns, function(r, m, i, what the products sum up to less their zeros, the sum of q). Where a group
  // is in several splits, the first one subtracts its zero.
  auto for_each_dot = [&](auto function) {
    const int32_t* const from = x_sums + static_cast<int64_t>(group) * x_sums_row + first_x + 2 * t;
    LOWBIT_UNROLL
    for (int m = 0; m < M_TILES; ++m)
      LOWBIT_UNROLL
      for (int j = 0; j < 2; ++j) {
        const int32_t sum = exact && split > 0 ? 0 : load(from + 8 * m + j);
        LOWBIT_UNROLL
        for (int i = 0; i < COPIES; ++i) {
          int32_t& product = products[i / 2][m][2 * (i % 2) + j];
          function(i, m, 2 * (i % 2) + j, product - center[i] * sum, sum);
          product = 0;
        }
      }
  };

  auto end_group = [&]() {
    for_each_dot([&](int i, int m, int at, int32_t dot, int32_t x_sum) {
      const float sum = fused_multiply_add(residual[i], static_cast<float>(x_sum), static_cast<float>(dot));
      sums[i / 2][m][at] = fused_multiply_add(scale[i], sum, sums[i / 2][m][at]);
    });
  };

  auto enter_group_of = [&](int k) {
    if (k < group_end) return;
    if (group >= first_group) end_group();
    ++group;
    group_end += group_size;
    begin_group();
    fetch_group(group + 1);
  };

  Held<BITS> held[COPIES] = {};

  // products += codes @ q.T for a chunk; where CUT, for columns begin .. end - 1 of it
  auto multiply = [&](int k, int stage, int begin, int end) {
    uint32_t a[COPIES][2];
    LOWBIT_UNROLL
    for (int i = 0; i < COPIES; ++i)
      LOWBIT_UNROLL
      for (int j = 0; j < 2; ++j) {
        a[i][j] = held[i].bytes(k / CHUNK % CHUNKS, j);
        if constexpr (CUT) a[i][j] &= int8::bytes_inside(k + 8 * t + 4 * j, begin, end);
      }
    LOWBIT_UNROLL
    for (int m = 0; m < M_TILES; ++m) {
      const Words2 xs = load_shared2(stage + (8 * m + g) * PITCH + ((k % TILE + 8 * t) ^ g % 4 * 32));
      LOWBIT_UNROLL
      for (int r = 0; r < ROW_TILES; ++r)
        multiply_bytes(products[r][m], a[2 * r][0], a[2 * r + 1][0], a[2 * r][1], a[2 * r + 1][1], xs.x, xs.y);
    }
  };

  auto multiply_chunk = [&](int k, int stage) {
    LOWBIT_UNROLL
    for (int i = 0; i < COPIES; ++i) held[i].read(stage + X_BYTES, i, k / CHUNK % CHUNKS);
    const int end = k + CHUNK < K ? k + CHUNK : K;
    for (int begin = k; begin < end; begin = group_end) {
      enter_group_of(begin);
      multiply(k, stage, begin, group_end);
      if constexpr (!CUT) break;
    }
  };

  // Through shared memory, so that neighbouring threads finish neighbouring columns of y. Each has one column, and 8 rows
  // of x at a time, for which it adds the outliers; the splits share them out.
  auto write_result = [&]() {
    barrier();  // nobody reads x any more, and no copy is on its way
    auto put = [&](int i, int m, int at, uint32_t bits) {
      store_shared(4 * ((8 * m + 2 * t + at % 2) * SUMS_PITCH + WARP_ROWS * warp + 8 * i + g), float_of(bits));
    };
    if (rows_exist && exact)
      for_each_dot([&](int i, int m, int at, int32_t dot, int32_t) { put(i, m, at, static_cast<uint32_t>(dot)); });
    if (rows_exist && !exact) {
      end_group();
      LOWBIT_UNROLL
      for (int i = 0; i < COPIES; ++i)
        LOWBIT_UNROLL
        for (int m = 0; m < M_TILES; ++m)
          LOWBIT_UNROLL
          for (int j = 0; j < 2; ++j)
            put(i, m, 2 * (i % 2) + j, bits_of(sums[i / 2][m][2 * (i % 2) + j]));
    }
    barrier();
    const int n = block_row + thread_index();
    if (n >= N) return;
    const bool outliers = outlier_values != nullptr;
    const int begin = outliers ? load(outlier_rows + n) : 0, end = outliers ? load(outlier_rows + n + 1) : 0;
    LOWBIT_ROLLED
    for (int first = 0; first < X_ROWS && first < x_rows; first += 8) {
      float sparse[8] = {};
      LOWBIT_ROLLED
      for (int i = begin + split; i < end; i += splits) {
        const float value = float_at(outlier_values, DType(outlier_dtype), i);
        const int column = wide_columns ? load(static_cast<const int32_t*>(outlier_columns) + i)
                                        : load(static_cast<const uint16_t*>(outlier_columns) + i);
        LOWBIT_UNROLL
        for (int j = 0; j < 8; ++j) {
          if (first + j >= x_rows) continue;
          const int64_t at = static_cast<int64_t>(first_x + first + j) * K + column;
          sparse[j] = fused_multiply_add(value, float_at(x, DType(dtype), at), sparse[j]);
        }
      }
      LOWBIT_UNROLL
      for (int j = 0; j < 8; ++j) {
        if (first + j >= x_rows) continue;
        const uint32_t sum = load_shared_word(4 * ((first + j) * SUMS_PITCH + thread_index()));
        const int m = first_x + first + j;
        if (splits > 1) {
          const int64_t part = (static_cast<int64_t>(split) * M + m) * N + n;
          store(parts + part, sum);
          if (outliers) store(outlier_parts + part, sparse[j]);
        } else {
          int8::finish(sum, sparse[j], inverse, scales, bias, y, m, n, N, exact, scale_row, scale_dtype, bias_dtype,
                       dtype);
        }
      }
    }
  };

  const int end_stage = stages * STAGE_BYTES;
  int stage = 0, free_stage = 0;  // that is read; that is written next
  auto advance = [&](int& which) { which = which + STAGE_BYTES < end_stage ? which + STAGE_BYTES : 0; };
  for (int d = 0; d < stages - 1; ++d) {
    fetch_tile(first_tile + d, free_stage);
    advance(free_stage);
  }
  fetch_group(first_group);
  LOWBIT_ROLLED
  for (int tile = first_tile; tile < end_tile; ++tile) {
    if (stages > 2)
      wait_copies<1>();
    else
      wait_copies<0>();
    barrier();  // the tile is there for all threads, and nobody reads the one before it any more
    fetch_tile(tile + stages - 1, free_stage);
    advance(free_stage);
    const int end = (tile + 1) * TILE < K ? (tile + 1) * TILE : K;
    LOWBIT_ROLLED
    for (int k = tile * TILE; k < end && rows_exist; k += CHUNK) multiply_chunk(k, stage);
    advance(stage);
  }
  wait_copies<0>();
  write_result();
}

// x_sums[group, m] = q[m, group * group_size : (group + 1) * group_size].sum(), a warp for each; zeros for m >= M
template <int WARPS_OF_BLOCK>
LOWBIT_KERNEL(32 * WARPS_OF_BLOCK, 1)
sum_groups(const int8_t* q, int32_t* x_sums, int M, int K, int columns, int group_size, int rows) {
  const int lane = thread_index() % 32, warp = thread_index() / 32;
  const int64_t pair = static_cast<int64_t>(block_index()) * WARPS_OF_BLOCK + warp;
  const int group = static_cast<int>(pair / rows), m = static_cast<int>(pair % rows);
  int32_t sum = 0;
  if (m < M) {
    const int begin = group * group_size, end = begin + group_size < K ? begin + group_size : K;
    for (int k = begin + lane; k < end; k += 32) sum += load(q + static_cast<int64_t>(m) * columns + k);
  }
  store_shared(4 * thread_index(), float_of(static_cast<uint32_t>(sum)));
  barrier();
  if (lane > 0) return;
  sum = 0;
  for (int i = 0; i < 32; ++i) sum += static_cast<int32_t>(load_shared_word(4 * (32 * warp + i)));
  store(x_sums + pair, sum);
}

}  // namespace packed_batch_int8
}  // namespace cuda
}  // namespace lowbit
