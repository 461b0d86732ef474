// CPU kernels of the family `packed`: raw pointers, no torch.
//   w[n,k] = (code[n,k] - zero[n,g]) * scale[n,g] (+ outlier[n,k]),  g = k / group_size
#pragma once
#include <cstdint>

#include "../common/dtype.h"
#include "../common/isa.h"

namespace lowbit {
namespace packed {

struct Weight {
  int64_t N, K, G, group_size;
  int bits;
  const uint8_t* packed;  // [N, row_bytes], row_bytes = ceil(K / 32) * bits * 4
  int64_t row_bytes;
  const void* scales;  // [N, G], or one value when per_tensor
  const void* zeros;   // as scales; null: symmetric, zero = 2^(bits-1)
  DType scales_dtype, zeros_dtype;
  bool per_tensor;
  const void* outlier_values;  // null: none
  DType outlier_dtype;
  const void* outlier_columns;  // uint16 (or int16: none is negative), int32 when wide_columns; rising in a row
  bool wide_columns;
  const int32_t* outlier_rows;  // [N + 1]
};

struct Linear {
  Weight weight;
  int64_t M;
  const void* x;  // [M, K], contiguous
  DType dtype;    // of x and y
  const void* bias;  // [N] or null
  DType bias_dtype;
  bool int8;             // int8 activations
  const float* x_scale;  // static activation scale; null: one per row of x
  void* y;               // [M, N]
};

// y[m,n] is the same to the last bit whatever M, whatever the row's place in the batch, whatever the split of N.
struct CpuKernel {
  int64_t (*prepared_bytes)(const Linear&);
  // x rows [m0, m1) -> prepared: fp32, or int8 codes with their scales
  void (*prepare)(const Linear&, void* prepared, int64_t m0, int64_t m1);
  // y[:, n0:n1]
  void (*linear)(const Linear&, const void* prepared, int64_t n0, int64_t n1);
  // out[0:K] = w[row, :]
  void (*dequantize)(const Weight&, int64_t row, DType dtype, void* out);
};

constexpr int64_t kRowTile = 4;  // output rows a kernel takes at a time: split N at multiples of it

extern const CpuKernel kernel_scalar, kernel_avx2, kernel_avx512, kernel_avx512vnni;

inline const CpuKernel& cpu_kernel(Isa isa) {
  switch (isa) {
#if defined(__x86_64__)
    case Isa::avx512vnni: return kernel_avx512vnni;
    case Isa::avx512: return kernel_avx512;
    case Isa::avx2: return kernel_avx2;
#endif
    default: return kernel_scalar;
  }
}

}  // namespace packed
}  // namespace lowbit
