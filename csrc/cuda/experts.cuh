// Rows of a stack of experts, for kernels of one matrix product: sorted by expert, and cut into tiles of rows, as
// cuda/experts_sort.cuh does it.
//
// A block of a linear kernel takes neighbouring rows of x. Of a stack it takes a tile of rows instead, and its expert's
// rows of the weight. All else is the linear kernel's, so that a row has the bits that the expert's linear gives.
#pragma once
#include "cuda/codes.h"
#include "cuda/experts.h"
#include "cuda/rows_of_block.cuh"

namespace lowbit {
namespace cuda {
namespace experts {

// Of Neighbours, the rows of a tile.
struct RowsOfExpert {
  static constexpr bool SORTED = true;
  const Words2* order;  // from the first place of the tile on
  int its_block;

  LOWBIT_DEVICE int block() const { return its_block; }
  LOWBIT_DEVICE int64_t of_x(int64_t m) const { return load(order + m).x; }
  LOWBIT_DEVICE int64_t of_y(int64_t m) const { return load(order + m).y; }
};

// What a block takes. Tiles run fastest: blocks that run together share weights in the second-level cache.
struct Part {
  int expert, rows, what;
  RowsOfExpert at;
};

LOWBIT_DEVICE Part part_of(const Words4* tiles, const Words2* order, int tile_count) {
  const Words4 tile = load(tiles + block_index() % tile_count);
  return {static_cast<int>(tile.x), static_cast<int>(tile.z), static_cast<int>(tile.w),
          {order + tile.y, block_index() / tile_count}};
}

// Whether a block of `threads` threads has no products to make. Then it writes what the rows of its tile get instead,
// in `columns` columns of y.
template <DType T>
LOWBIT_DEVICE bool writes_instead(const Part& part, Element<T>* y, int N, int columns, int threads) {
  if (part.what == PRODUCTS) return false;
  if (part.what == NOTHING) return true;
  const Element<T> value = rounded_to<T>(part.what == NANS ? not_a_number() : 0.0f);
  const int first = part.at.block() * columns, end = first + columns < N ? first + columns : N;
  for (int m = 0; m < part.rows; ++m)
    for (int n = first + thread_index(); n < end; n += threads) store(y + part.at.of_y(m) * N + n, value);
  return true;
}

// Where an expert's values begin.
LOWBIT_DEVICE const void* moved(const void* values, int64_t by, int dtype) {
  const int size = dtype == static_cast<int>(DType::f32) ? 4 : dtype == static_cast<int>(DType::u8) ? 1 : 2;
  return values == nullptr ? nullptr : static_cast<const char*>(values) + by * size;
}

LOWBIT_DEVICE const int32_t* moved(const int32_t* outlier_rows, int64_t by) {
  return outlier_rows == nullptr ? nullptr : outlier_rows + by;
}

}  // namespace experts
}  // namespace cuda
}  // namespace lowbit
