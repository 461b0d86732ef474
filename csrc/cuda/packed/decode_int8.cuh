// Few rows of x, as int8, times a weight of the family `packed`. It equals the PyTorch lines
//
//   q, inverse = lowbit.backends.reference.quantize_activations(x, x_scale)
//   dot = torch.stack([q_g @ (codes_g - zero_g).T for each group g])                 exact: int32
//   y = (dot.float() * scales).sum(0) / inverse + torch.nn.functional.linear(x, outliers, bias)
//
// with one rounding to the dtype of x. Outliers multiply x itself.
//
// cuda/decode.cuh says how the work is shared out. q comes from the kernel before (cuda/int8.cuh). Codes are bytes
// without a sign, the left operand of mma.sync on bytes: 16 rows of W by 32 columns are one product, whose columns are
// those that the threads have of a chunk. A zero point is an integer, or the one nearest to it and a residual; both
// multiply the sum of q, which a second product makes, with bytes of 1. The scale multiplies the float32 of a group's
// integer. Where a row has one group and an integer zero, the sum stays an integer to the end.
#pragma once
#include "cuda/decode.cuh"
#include "cuda/int8.cuh"
#include "cuda/packed/decode_int8.h"
#include "cuda/packed/operands.h"

namespace lowbit {
namespace cuda {
namespace decode {

// The slices of q. Its rows have whole tiles, and are where copies of 16 bytes can begin.
template <int M_TILES>
struct Slices<M_TILES, int8_t> {
  static constexpr int STAGES = STAGES_OF<M_TILES>, PITCH = packed_decode_int8::PITCH;
  const int8_t* q;
  int M, columns, end_slice;

  LOWBIT_DEVICE int stage(int slice) const { return slice % STAGES * M * PITCH; }

  LOWBIT_DEVICE void fetch(int slice) const {
    constexpr int COPIES = SLICE / 16;  // of a row
    const int to = stage(slice), column = thread_index() % COPIES * 16;
    if (slice < end_slice && slice * SLICE + column < columns) {
      LOWBIT_ROLLED
      for (int m = thread_index() / COPIES; m < M; m += THREADS / COPIES)
        copy_async(to + m * PITCH + column, q + static_cast<int64_t>(m) * columns + slice * SLICE + column, false);
    }
    commit_copies();  // one group for every slice, so that waiting can count them
  }
};

}  // namespace decode

namespace packed_decode_int8 {

using namespace decode;

// Args:
//   BITS, M_TILES, CUT, scale_row .. zero_group, group_factor: as of packed/decode.cuh.
//   q, inverse: of cuda/int8.h.
//   x, dtype: as it was, for the outliers; the dtype of x and y.
//   exact: a row has one group, and an integer zero or none.
//   parts, outlier_parts: [splits, M, N], what is written instead of y where splits > 1.
template <int BITS, int M_TILES, bool CUT>
LOWBIT_KERNEL(THREADS, BITS <= 4 && M_TILES == 1 && !CUT ? 2 : 1)
kernel(const uint8_t* tiles, const void* scales, const void* zeros, const void* bias, const void* outlier_values,
       const void* outlier_columns, const int32_t* outlier_rows, const int8_t* q, const float* inverse, const void* x,
       void* y, int M, int N, int K, int columns, int group_size, uint32_t group_factor, int scale_row, int scale_group,
       int zero_row, int zero_group, int scale_dtype, int zero_dtype, int bias_dtype, int outlier_dtype,
       int wide_columns, int dtype, int exact, uint32_t* parts, float* outlier_parts, int splits) {
  constexpr uint32_t ONES = 0x01010101u;
  const Share s = share(N, K, splits);
  const Slices<M_TILES, int8_t> slices = {q, M, columns, s.end_slice};
  const bool outliers = outlier_values != nullptr;
  constexpr int COLUMNS = 8 * M_TILES, SUMS = K_WARPS * ROWS * COLUMNS * 4;
  const int ring = slices.STAGES * M * PITCH, outliers_at = ring > SUMS ? ring : SUMS;

  float sums[M_TILES][4] = {};
  int32_t products[M_TILES][4] = {}, x_sums[M_TILES][4] = {};
  float scale[2] = {}, residual[2] = {};
  int center[2] = {1 << (BITS - 1), 1 << (BITS - 1)};
  enum { NO_ZEROS, INTEGERS, FLOATS };
  const int kind_of_zeros = zeros == nullptr ? NO_ZEROS : zero_dtype == int(DType::u8) ? INTEGERS : FLOATS;
  // Of rows of scales and zeros: where they begin, and the bytes from one group to the next.
  const char *scale_rows[2], *zero_rows[2];
  LOWBIT_UNROLL
  for (int half = 0; half < 2; ++half) {
    const int64_t row = s.row[half];
    scale_rows[half] = static_cast<const char*>(scales) + row * scale_row * size_of(scale_dtype);
    zero_rows[half] = static_cast<const char*>(zeros) + row * zero_row * size_of(zero_dtype);
  }
  const int scale_step = scale_group * size_of(scale_dtype), zero_step = zero_group * size_of(zero_dtype);

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

  // What the group's columns so far sum up to, less their zeros.
  auto dot = [&](int m, int i) { return products[m][i] - center[i / 2] * x_sums[m][i]; };

  auto end_group = [&]() {
    LOWBIT_UNROLL
    for (int m = 0; m < M_TILES; ++m)
      LOWBIT_UNROLL
      for (int i = 0; i < 4; ++i) {
        const float sum = fused_multiply_add(residual[i / 2], static_cast<float>(x_sums[m][i]),
                                             static_cast<float>(dot(m, i)));
        sums[m][i] = fused_multiply_add(scale[i / 2], sum, sums[m][i]);
        products[m][i] = x_sums[m][i] = 0;
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
      center[half] = static_cast<int>(zero_ahead[half]);
      if (kind_of_zeros == FLOATS) {
        const float zero = float_of(zero_ahead[half], zero_dtype), largest = static_cast<float>((1 << BITS) - 1);
        center[half] = static_cast<int>((zero > 0.0f ? zero < largest ? zero : largest : 0.0f) + 0.5f);
        residual[half] = static_cast<float>(center[half]) - zero;
      }
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

  int8::Bytes<BITS> bytes[2] = {};

  // Adds the products of one chunk of 32 columns; where CUT, of those in [begin, end).
  auto multiply_chunk = [&](const TileRow<BITS>(&w)[2], int chunk, const Words2(&xs)[M_TILES], int column, int begin,
                            int end) {
    uint32_t a[4], ones[2] = {ONES, ONES};
    LOWBIT_UNROLL
    for (int i = 0; i < 4; ++i) a[i] = bytes[i % 2].of(w[i % 2], chunk, i / 2);
    if constexpr (CUT) {
      LOWBIT_UNROLL
      for (int i = 0; i < 2; ++i) {
        const uint32_t mask = int8::bytes_inside(column + 4 * i, begin, end);
        a[2 * i] &= mask, a[2 * i + 1] &= mask, ones[i] &= mask;
      }
    }
    LOWBIT_UNROLL
    for (int m = 0; m < M_TILES; ++m) {
      multiply_bytes(products[m], a[0], a[1], a[2], a[3], xs[m].x, xs[m].y);
      multiply_bytes(x_sums[m], ones[0], ones[0], ones[1], ones[1], xs[m].x, xs[m].y);
    }
  };

  // Rows of x that are not there repeat the last one. What is multiplied with them is not stored.
  int x_row[M_TILES];
  LOWBIT_UNROLL
  for (int m = 0; m < M_TILES; ++m) x_row[m] = 8 * m + s.g < M ? 8 * m + s.g : M - 1;

  auto multiply_tile = [&](const TileRow<BITS>(&w)[2], int tile, int stage) {
    LOWBIT_UNROLL
    for (int chunk = 0; chunk < CHUNKS; ++chunk) {
      const int k = tile * TILE + chunk * CHUNK;
      if (CUT && k >= K) break;
      LOWBIT_UNROLL
      for (int half = 0; half < 2; ++half) bytes[half].next_chunk(w[half], chunk);
      Words2 xs[M_TILES];
      LOWBIT_UNROLL
      for (int m = 0; m < M_TILES; ++m)
        xs[m] = load_shared2(stage + x_row[m] * PITCH + s.k_warp * TILE + chunk * CHUNK + 8 * s.t);
      if constexpr (CUT) {
        const int end = k + CHUNK < K ? k + CHUNK : K;
        for (int next = k / group_size; next * group_size < end; ++next) {
          if (next != group) {
            end_group();
            if (group_ahead != next || group < 0) fetch_group(next);
            begin_group(next);
            if ((next + 1) * group_size < K) fetch_group(next + 1);
          }
          multiply_chunk(w, chunk, xs, k + 8 * s.t, next * group_size, (next + 1) * group_size);
        }
      } else {
        // Past K there are no groups, and q is zeros.
        if (chunk >= group_end - tile * CHUNKS) enter_group(tile * CHUNKS + chunk, tile);
        multiply_chunk(w, chunk, xs, 0, 0, 0);
      }
    }
  };

  const auto place = [&](int m, int i) {
    const int n = 16 * s.row_warp + 8 * (i / 2) + s.g, row = 8 * m + 2 * s.t + i % 2;
    return 4 * ((s.k_warp * COLUMNS + row) * ROWS + n);
  };

  // The outliers of a row are shared out to its splits and warps. They multiply x as it is.
  auto add_outliers = [&]() {
    float found[M_TILES][4] = {};
    LOWBIT_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int end = load(outlier_rows + s.row[half] + 1);
      for (int i = load(outlier_rows + s.row[half]) + s.split * K_WARPS + s.k_warp; i < end; i += splits * K_WARPS) {
        const float value = float_at(outlier_values, DType(outlier_dtype), i);
        const int column = wide_columns ? load(static_cast<const int32_t*>(outlier_columns) + i)
                                        : load(static_cast<const uint16_t*>(outlier_columns) + i);
        LOWBIT_UNROLL
        for (int m = 0; m < M_TILES; ++m)
          LOWBIT_UNROLL
          for (int j = 0; j < 2; ++j) {
            const int row = 8 * m + 2 * s.t + j;
            if (row >= M) continue;
            float& sum = found[m][2 * half + j];
            sum = fused_multiply_add(value, float_at(x, DType(dtype), static_cast<int64_t>(row) * K + column), sum);
          }
      }
    }
    LOWBIT_UNROLL
    for (int m = 0; m < M_TILES; ++m)
      LOWBIT_UNROLL
      for (int i = 0; i < 4; ++i) store_shared(outliers_at + place(m, i), found[m][i]);
  };

  // Adds the sums of the K_WARPS warps in order, and finishes them, unless there are other splits to add.
  auto write_result = [&]() {
    barrier();  // nobody reads x any more, and no copy is on its way
    LOWBIT_UNROLL
    for (int m = 0; m < M_TILES; ++m)
      LOWBIT_UNROLL
      for (int i = 0; i < 4; ++i)
        store_shared(place(m, i), exact ? float_of(static_cast<uint32_t>(dot(m, i))) : sums[m][i]);
    barrier();
    for (int i = thread_index(); i < M * ROWS; i += THREADS) {
      const int n = s.first_row + i % ROWS, m = i / ROWS;
      if (n >= N) continue;
      uint32_t sum = load_shared_word(4 * i);
      float sparse = outliers ? load_shared(outliers_at + 4 * i) : 0.0f;
      LOWBIT_UNROLL
      for (int k = 1; k < K_WARPS; ++k) {
        sum = int8::sum_of(sum, load_shared_word(4 * (k * COLUMNS * ROWS + i)), exact);
        if (outliers) sparse += load_shared(outliers_at + 4 * (k * COLUMNS * ROWS + i));
      }
      if (splits > 1) {
        const int64_t part = (static_cast<int64_t>(s.split) * M + m) * N + n;
        store(parts + part, sum);
        if (outliers) store(outlier_parts + part, sparse);
        continue;
      }
      int8::finish(sum, sparse, inverse, scales, bias, y, m, n, N, exact, scale_row, scale_dtype, bias_dtype, dtype);
    }
  };

  auto meanwhile = [&]() {
    const int first_column = s.first_slice * SLICE + s.k_warp * TILE;
    if (regular && first_column < K) fetch_group(first_column / group_size);
    if (outliers) add_outliers();
  };

  for_each_tile<BITS>(s, tiles, slices, meanwhile, multiply_tile);
  if (!exact) end_group();
  write_result();
}

}  // namespace packed_decode_int8
}  // namespace cuda
}  // namespace lowbit
