// The operand of the family `packed`: raw pointers, no torch.
//   w[n,k] = (code[n,k] - zero[n,g]) * scale[n,g] (+ outlier[n,k]),  g = k / group_size
#pragma once
#include "common/operands.h"

namespace lowbit {
namespace packed {

struct Weight : Codes {
  const void* scales;  // of row n and group g at n * scales_row + g * scales_group; one value when per_tensor
  const void* zeros;   // as scales; null: symmetric, zero = 2^(bits-1)
  int64_t scales_row, scales_group, zeros_row, zeros_group;  // one of a pair is 1
  DType scales_dtype, zeros_dtype;
  bool per_tensor;
};

}  // namespace packed
}  // namespace lowbit
