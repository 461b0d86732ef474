// What the gather kernels of the families with packed codes share: everything but what number a code is.
//
// Codes are in tiles (lowbit/backends/triton/tiles.py). A unit is one tile of one row of `out`. Four threads share it:
// the 16 bytes that thread t loads from a part of a plane are lanes 8t .. 8t+7, and after one shift 8 neighbouring
// columns, which are the 16 bytes of one store. In float32 eight threads share a unit: two of them load the same 16
// bytes, in one access, and each stores 4 columns.
//
// Outliers are few. After all of a block's units are written, its warps write the elements that have one once more.
//
// A row whose id is not in [0, N) is NaN: a kernel cannot raise, and checking ids would wait for the GPU.
#pragma once
#include "cuda/codes.h"
#include "cuda/division.h"
#include "cuda/gather.h"

namespace lowbit {
namespace cuda {
namespace gather {

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
//   by_group, by_tiles: divide by group_size, and by the tiles of a row.
//   wide_ids: ids are int64, otherwise int32; null: row i of `out` is row i of W.
//   vectors: the rows of `out` begin at multiples of 16 bytes.
struct Gathered {
  const uint8_t* tiles;
  const void *outlier_values, *outlier_columns;
  const int32_t* outlier_rows;
  const void* ids;
  void* out;
  int count, N, K, group_size;
  Divisor by_group, by_tiles;
  int outlier_dtype, wide_columns, wide_ids, vectors;
};

// Numbers says what a code is: `Group at(n, group)` finds what a group of row n has in common, `Group missing()` makes
// every code of a row that is not there a NaN, and `value(code, group)` is the float32.
template <int BITS, DType T, class Numbers>
LOWBIT_DEVICE void write_rows(const Gathered& c, const Numbers& numbers) {
  using Group = typename Numbers::Group;
  constexpr int LANES = LANES_OF<T>, UNITS = UNITS_OF<T>, TILE_BYTES = TILE * BITS / 8;
  const int tile_count = (c.K + TILE - 1) / TILE;
  const int first_unit = block_index() * UNITS, units = c.count * tile_count;
  const int end_unit = units - first_unit < UNITS ? units : first_unit + UNITS;

  // The row of W that is row i of `out`; -1: there is none.
  auto row_at = [&](int i) {
    int64_t n = i;
    if (c.ids != nullptr)
      n = c.wide_ids ? load(static_cast<const int64_t*>(c.ids) + i) : load(static_cast<const int32_t*>(c.ids) + i);
    return n >= 0 && n < c.N ? static_cast<int>(n) : -1;
  };

  auto store_element = [&](int64_t at, float w) {
    if constexpr (T == DType::f32)
      store(static_cast<float*>(c.out) + at, w);
    else
      store(static_cast<uint16_t*>(c.out) + at, from_float<T>(w));
  };
  auto store_vector = [&](int64_t at, const float(&w)[LANES]) {
    uint32_t words[4];
    LOWBIT_UNROLL
    for (int i = 0; i < 4; ++i) {
      if constexpr (T == DType::f32)
        words[i] = bits_of(w[i]);
      else
        words[i] = from_float<T>(w[2 * i]) | uint32_t(from_float<T>(w[2 * i + 1])) << 16;
    }
    constexpr int SIZE = 16 / LANES;
    const Words4 vector{words[0], words[1], words[2], words[3]};
    store(reinterpret_cast<Words4*>(static_cast<char*>(c.out) + at * SIZE), vector);
  };

  // The number itself, wherever it stands: for what is too rare to have its code in a register.
  auto value_at = [&](int row, int column) {
    const uint8_t* tile = c.tiles + (static_cast<int64_t>(row) * tile_count + column / TILE) * TILE_BYTES;
    return numbers.value(code_at<BITS>(tile, column % TILE), numbers.at(row, c.by_group.quotient(column)));
  };

  auto write_unit = [&](int unit, int sharer) {
    const int i = c.by_tiles.quotient(unit), t = unit - i * tile_count, row = row_at(i);
    TileRow<BITS> held{};
    Group group = numbers.missing();
    int number = -1, end = c.K;
    if (row >= 0) {
      held.fetch(c.tiles + (static_cast<int64_t>(row) * tile_count + t) * TILE_BYTES, sharer * LANES / 8);
      if (LANES == 4 && sharer % 2) keep_upper_lanes(held);
    }
    LOWBIT_UNROLL
    for (int chunk = 0; chunk < TILE / CHUNK; ++chunk) {
      const int column = t * TILE + chunk * CHUNK + sharer * LANES;
      if (column >= c.K) break;
      const int64_t at = static_cast<int64_t>(i) * c.K + column;
      if (row >= 0 && c.by_group.quotient(column) != number) {
        number = c.by_group.quotient(column);
        group = numbers.at(row, number);
        end = (number + 1) * c.group_size;
      }
      if (end < c.K && end < column + LANES) {  // it ends among these columns
        for (int j = 0; j < LANES && column + j < c.K; ++j) store_element(at + j, value_at(row, column + j));
        continue;
      }
      float w[LANES];
      LOWBIT_UNROLL
      for (int j = 0; j < LANES; ++j) w[j] = numbers.value(held.codes(chunk, j / 2) >> 16 * (j % 2) & 0xFFFFu, group);
      if (c.vectors) {
        store_vector(at, w);
      } else {
        LOWBIT_UNROLL
        for (int j = 0; j < LANES; ++j)
          if (column + j < c.K) store_element(at + j, w[j]);
      }
    }
  };

  // Those whose columns are in the block's units, row after row.
  auto write_outliers = [&]() {
    const int lane = thread_index() % 32, warp = thread_index() / 32;
    for (int i = c.by_tiles.quotient(first_unit) + warp; i * tile_count < end_unit; i += THREADS / 32) {
      const int row = row_at(i);
      if (row < 0) continue;
      const int end = load(c.outlier_rows + row + 1);
      for (int entry = load(c.outlier_rows + row) + lane; entry < end; entry += 32) {
        const int column = c.wide_columns ? load(static_cast<const int32_t*>(c.outlier_columns) + entry)
                                          : load(static_cast<const uint16_t*>(c.outlier_columns) + entry);
        const int unit = i * tile_count + column / TILE;
        if (unit < first_unit || unit >= end_unit) continue;
        const float outlier = float_at(c.outlier_values, DType(c.outlier_dtype), entry);
        store_element(static_cast<int64_t>(i) * c.K + column, value_at(row, column) + outlier);
      }
    }
  };

  constexpr int SHARERS = CHUNK / LANES;
  const int unit = first_unit + thread_index() / SHARERS;
  if (unit < end_unit) write_unit(unit, thread_index() % SHARERS);
  if (c.outlier_values != nullptr) {
    barrier();  // what is written once more has been written
    write_outliers();
  }
}

}  // namespace gather
}  // namespace cuda
}  // namespace lowbit
