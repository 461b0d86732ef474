// CPU kernels of the family `kron`: raw pointers, no torch.
#pragma once
#include "common/kron.h"
#include "cpu/kernel.h"

namespace lowbit {
namespace kron {

// y = x @ (sum_r left[r] (x) right[r]).T, as two products: for every row m of x, read as the matrix X[k_left, k_right],
//   right_first:  T_r = X right[r].T,  y = sum_r left[r] T_r        else:  U_r = left[r] X,  y = sum_r U_r right[r].T
// `right` is a or b, whichever makes the better inner loop; the permutations and that exchange are in the two maps.
struct Linear {
  int64_t R;
  Factor left, right;
  bool right_first;
  bool dot;               // lanes along the columns of `right`, else along its rows
  const int32_t* source;  // X[k_left, k_right] = x[source[k_left * right.K + k_right]]; null: the identity
  const int32_t* target;  // result[n_left, n_right] = y[target[n_left * right.N + n_right]]; null: the identity
  int64_t M;
  const void* x;  // [M, K], contiguous
  DType dtype;    // of x and y
  const void* bias;  // [N] or null, in the order of y
  DType bias_dtype;
  void* y;  // [M, N]

  int64_t in_features() const { return left.K * right.K; }
  int64_t out_features() const { return left.N * right.N; }
};

// y[m,n] is the same to the last bit whatever M, whatever the row's place in the batch, whatever the split of tasks.
struct CpuKernel {
  // Bytes that all tasks of a call share: the left factor, the bias in fp32, and the rows of x that they multiply.
  int64_t (*shared_bytes)(const Linear&);
  void (*prepare_constants)(const Linear&, void* shared);  // once; then, as often as there are ranges of rows of x:
  void (*prepare)(const Linear&, void* shared, int64_t m0, int64_t m1);
  int64_t (*tasks)(const Linear&);
  void (*linear)(const Linear&, const void* shared, int64_t task0, int64_t task1);
  // out[0:K] = w[row, :]
  void (*dequantize)(const Weight&, int64_t row, DType dtype, void* out);
};

LOWBIT_DECLARE_KERNELS(CpuKernel)

// The same where x and both factors are bfloat16. On avx512bf16, their kernel multiplies bfloat16 and rounds to it
// between the products.
inline const CpuKernel& cpu_kernel_all_bf16(Isa isa) {
#if defined(__x86_64__)
  extern const CpuKernel kernel_all_bf16;
  if (isa == Isa::avx512bf16) return kernel_all_bf16;
#endif
  return cpu_kernel(isa);
}

}  // namespace kron
}  // namespace lowbit
