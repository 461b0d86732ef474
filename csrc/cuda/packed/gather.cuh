// Rows of a weight of the family `packed`, as numbers. It equals the PyTorch line
//
//   out = ((codes - zeros[:, group]) * scales[:, group] + outliers)[ids].to(dtype)
//
// with group = torch.arange(K) // group_size: the difference, the product and the sum are each rounded to float32, the
// result once more to its dtype. Without ids it is all of W. A row whose id is not in [0, N) is NaN: a kernel cannot
// raise, and checking ids would wait for the GPU.
//
// Codes are in tiles (lowbit/backends/triton/tiles.py). A unit is one tile of one row of `out`. Four threads share it:
// the 16 bytes that thread t loads from a part of a plane are lanes 8t .. 8t+7, and after one shift 8 neighbouring
// columns, which are the 16 bytes of one store. In float32 eight threads share a unit: two of them load the same 16
// bytes, in one access, and each stores 4 columns.
//
// Outliers are few. After all of a block's units are written, its warps write the elements that have one once more.
#pragma once
#include "cuda/codes.h"
#include "cuda/division.h"
#include "cuda/packed/gather.h"

namespace lowbit {
namespace cuda {
namespace packed_gather {

// The code of one column of a tile.
template <int BITS>
LOWBIT_DEVICE uint32_t code_at(const uint8_t* tile, int column) {
  const int chunk = column / CHUNK, lane = column % CHUNK;
  auto field = [&](int part, int width) {  // of a plane that begins with this part of 64 bytes
    const int fields = 16 / width;
    const uint8_t* at = tile + 64 * (part + chunk / fields) + 2 * lane;
    return uint32_t(load(reinterpret_cast<const uint16_t*>(at))) >> chunk % fields * width & ((1u << width) - 1);
  };
  uint32_t code = 0;
  if constexpr (BITS > 1) code = field(0, BITS == 8 ? 8 : BITS >= 4 ? 4 : 2);
  if constexpr (BITS == 6 || BITS == 7) code |= field(2, 2) << 4;
  if constexpr (BITS % 2) code |= (load(tile + 64 * (BITS / 2) + lane) >> chunk & 1u) << (BITS - 1);
  return code;
}

// Lanes 8t + 4 .. 8t + 7 take the place of 8t .. 8t + 3.
template <int BITS>
LOWBIT_DEVICE void keep_upper_lanes(TileRow<BITS>& held) {
  LOWBIT_UNROLL
  for (int p = 0; p < BITS / 2; ++p) held.parts[p].x = held.parts[p].z, held.parts[p].y = held.parts[p].w;
  held.octets.x = held.octets.y;
}

// Args:
//   BITS, T: of the codes; the dtype of `out`.
//   group_factor, group_shift: the Divisor by group_size; tile_factor, tile_shift: that by the tiles of a row.
//   scale_row, scale_group, zero_row, zero_group: between the values of neighbouring rows and groups; 0: one for all.
//   vectors: the rows of `out` begin at multiples of 16 bytes.
template <int BITS, DType T>
LOWBIT_KERNEL(THREADS, 4)
kernel(const uint8_t* tiles, const void* scales, const void* zeros, const void* outlier_values,
       const void* outlier_columns, const int32_t* outlier_rows, const void* ids, void* out, int count, int N, int K,
       int group_size, uint32_t group_factor, int group_shift, uint32_t tile_factor, int tile_shift, int scale_row,
       int scale_group, int zero_row, int zero_group, int scale_dtype, int zero_dtype, int outlier_dtype,
       int wide_columns, int wide_ids, int vectors) {
  constexpr int LANES = LANES_OF<T>, UNITS = UNITS_OF<T>, TILE_BYTES = TILE * BITS / 8;
  const int tile_count = (K + TILE - 1) / TILE;
  const Divisor by_group{group_factor, group_shift}, by_tiles{tile_factor, tile_shift};
  const int first_unit = block_index() * UNITS, units = count * tile_count;
  const int end_unit = units - first_unit < UNITS ? units : first_unit + UNITS;

  // The row of W that is row i of `out`; -1: there is none.
  auto row_at = [&](int i) {
    int64_t n = i;
    if (ids != nullptr)
      n = wide_ids ? load(static_cast<const int64_t*>(ids) + i) : load(static_cast<const int32_t*>(ids) + i);
    return n >= 0 && n < N ? static_cast<int>(n) : -1;
  };

  struct Group {
    float scale, zero;
  };
  auto group_at = [&](int64_t n, int64_t group) {
    Group found;
    found.scale = float_at(scales, DType(scale_dtype), n * scale_row + group * scale_group);
    found.zero = static_cast<float>(1 << (BITS - 1));
    if (zeros != nullptr) found.zero = float_at(zeros, DType(zero_dtype), n * zero_row + group * zero_group);
    return found;
  };
  auto value = [](uint32_t code, const Group& group) {
    return multiply(static_cast<float>(code) - group.zero, group.scale);
  };

  auto store_element = [&](int64_t at, float w) {
    if constexpr (T == DType::f32)
      store(static_cast<float*>(out) + at, w);
    else
      store(static_cast<uint16_t*>(out) + at, from_float<T>(w));
  };
  auto store_vector = [&](int64_t at, const float(&w)[LANES]) {
    uint32_t words[4];
    LOWBIT_UNROLL
    for (int i = 0; i < 4; ++i) {
      if constexpr (T == DType::f32)
        words[i] = float_bits(w[i]);
      else
        words[i] = from_float<T>(w[2 * i]) | uint32_t(from_float<T>(w[2 * i + 1])) << 16;
    }
    constexpr int SIZE = 16 / LANES;
    const Words4 vector{words[0], words[1], words[2], words[3]};
    store(reinterpret_cast<Words4*>(static_cast<char*>(out) + at * SIZE), vector);
  };

  // The number itself, wherever it stands: for what is too rare to have its code in a register.
  auto value_at = [&](int row, int column) {
    const uint8_t* tile = tiles + (static_cast<int64_t>(row) * tile_count + column / TILE) * TILE_BYTES;
    return value(code_at<BITS>(tile, column % TILE), group_at(row, by_group.quotient(column)));
  };

  auto write_unit = [&](int unit, int sharer) {
    const int i = by_tiles.quotient(unit), t = unit - i * tile_count, row = row_at(i);
    TileRow<BITS> held{};
    Group group{not_a_number(), 0.0f};  // of a row that is not there
    int number = -1, end = K;
    if (row >= 0) {
      held.fetch(tiles + (static_cast<int64_t>(row) * tile_count + t) * TILE_BYTES, sharer * LANES / 8);
      if (LANES == 4 && sharer % 2) keep_upper_lanes(held);
    }
    LOWBIT_UNROLL
    for (int chunk = 0; chunk < TILE / CHUNK; ++chunk) {
      const int column = t * TILE + chunk * CHUNK + sharer * LANES;
      if (column >= K) break;
      const int64_t at = static_cast<int64_t>(i) * K + column;
      if (row >= 0 && by_group.quotient(column) != number) {
        number = by_group.quotient(column);
        group = group_at(row, number);
        end = (number + 1) * group_size;
      }
      if (end < K && end < column + LANES) {  // it ends among these columns
        for (int j = 0; j < LANES && column + j < K; ++j) store_element(at + j, value_at(row, column + j));
        continue;
      }
      float w[LANES];
      LOWBIT_UNROLL
      for (int j = 0; j < LANES; ++j) w[j] = value(held.codes(chunk, j / 2) >> 16 * (j % 2) & 0xFFFFu, group);
      if (vectors) {
        store_vector(at, w);
      } else {
        LOWBIT_UNROLL
        for (int j = 0; j < LANES; ++j)
          if (column + j < K) store_element(at + j, w[j]);
      }
    }
  };

  // Those whose columns are in the block's units, row after row.
  auto write_outliers = [&]() {
    const int lane = thread_index() % 32, warp = thread_index() / 32;
    for (int i = by_tiles.quotient(first_unit) + warp; i * tile_count < end_unit; i += THREADS / 32) {
      const int row = row_at(i);
      if (row < 0) continue;
      const int end = load(outlier_rows + row + 1);
      for (int entry = load(outlier_rows + row) + lane; entry < end; entry += 32) {
        const int column = wide_columns ? load(static_cast<const int32_t*>(outlier_columns) + entry)
                                        : load(static_cast<const uint16_t*>(outlier_columns) + entry);
        const int unit = i * tile_count + column / TILE;
        if (unit < first_unit || unit >= end_unit) continue;
        const float outlier = float_at(outlier_values, DType(outlier_dtype), entry);
        store_element(static_cast<int64_t>(i) * K + column, value_at(row, column) + outlier);
      }
    }
  };

  constexpr int SHARERS = CHUNK / LANES;
  const int unit = first_unit + thread_index() / SHARERS;
  if (unit < end_unit) write_unit(unit, thread_index() % SHARERS);
  if (outlier_values != nullptr) {
    barrier();  // what is written once more has been written
    write_outliers();
  }
}

}  // namespace packed_gather
}  // namespace cuda
}  // namespace lowbit
