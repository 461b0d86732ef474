// The call of an embedding, and of a dequantize.
#pragma once
#include <cstdint>

#include "common/dtype.h"

namespace lowbit {
namespace cuda {

// out[i, :] = W[ids[i], :]
template <class Weight>
struct Rows {
  Weight weight;
  const void* ids;  // [count], int32 or, when wide, int64; null: all rows of W
  bool wide;
  int64_t count;
  void* out;  // [count, K]
  DType dtype;
};

}  // namespace cuda
}  // namespace lowbit
