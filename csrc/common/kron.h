// The operand of the family `kron`: raw pointers, no torch.
//   w[n,k] = sum_r a[r,n1,k1] * b[r,n2,k2],  n = n1 * N2 + n2,  k = k1 * K2 + k2,  up to a permutation of either
#pragma once
#include <cstdint>

#include "common/dtype.h"

namespace lowbit {
namespace kron {

// One factor of every term, as the matrix [R * N, K]: dense, or packed as in the family `packed`.
struct Factor {
  int64_t N, K;
  DType dtype;         // of dense values; none: packed
  const void* values;  // [R * N, K], or packed words [R * N, row_bytes], row_bytes = ceil(K / 32) * bits * 4
  int bits;
  int64_t row_bytes, total_bytes;
  int64_t G, group_size;
  const void* scales;  // [R * N, G], or one value when per_tensor
  const void* zeros;   // as scales; null: symmetric, zero = 2^(bits-1)
  DType scales_dtype, zeros_dtype;
  bool per_tensor;
};

struct Weight {
  int64_t N, K, R;
  Factor a, b;
  const int32_t* input_permutation;   // [K] or null: w[n,k] = kron[n, input_permutation[k]]
  const int32_t* output_permutation;  // [N] or null: w[n,k] = kron[output_permutation[n], k]
};

}  // namespace kron
}  // namespace lowbit
