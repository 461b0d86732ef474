// The call of a stack of experts.
#pragma once
#include <cstdint>

#include "common/operands.h"

namespace lowbit {
namespace cuda {

// y[i, :] = x[i / r, :] @ W[ids[i]].T + bias[ids[i]], r = S / M; zeros where an id is E or more, NaN where it is negative
template <class Weight>
struct Experts {
  Linear<Weight> linear;  // of the whole stack: its weight [E * N, K], its bias [E * N], x [M, K], y [S, N]
  const void* ids;        // [S], int32 or, when wide, int64
  bool wide;
  int64_t S, E;
};

}  // namespace cuda
}  // namespace lowbit
