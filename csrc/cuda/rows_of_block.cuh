// Which rows of x and y a block multiplies. What takes this as a template parameter serves stacks of experts, too, by
// RowsOfExpert of cuda/experts.cuh.
#pragma once
#include "cuda/primitives.h"

namespace lowbit {
namespace cuda {

// Of a linear: rows that are neighbours.
struct Neighbours {
  static constexpr bool SORTED = false;

  LOWBIT_DEVICE int block() const { return block_index(); }  // among those of the weight

  // Where row m of the product is, in x and in y.
  LOWBIT_DEVICE int64_t of_x(int64_t m) const { return m; }
  LOWBIT_DEVICE int64_t of_y(int64_t m) const { return m; }
};

}  // namespace cuda
}  // namespace lowbit
