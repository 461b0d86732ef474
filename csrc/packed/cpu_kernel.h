// CPU kernels of the family `packed`: raw pointers, no torch.
//   w[n,k] = (code[n,k] - zero[n,g]) * scale[n,g] (+ outlier[n,k]),  g = k / group_size
#pragma once
#include "../common/isa.h"
#include "../common/kernel.h"

namespace lowbit {
namespace packed {

struct Weight : Codes {
  const void* scales;  // of row n and group g at n * scales_row + g * scales_group; one value when per_tensor
  const void* zeros;   // as scales; null: symmetric, zero = 2^(bits-1)
  int64_t scales_row, scales_group, zeros_row, zeros_group;  // one of a pair is 1
  DType scales_dtype, zeros_dtype;
  bool per_tensor;
};

using Linear = lowbit::Linear<Weight>;
using CpuKernel = lowbit::CpuKernel<Weight>;

extern const CpuKernel kernel_scalar, kernel_avx2, kernel_avx512, kernel_avx512vnni, kernel_avx512bf16;

inline const CpuKernel& cpu_kernel(Isa isa) {
  switch (isa) {
#if defined(__x86_64__)
    case Isa::avx512bf16: return kernel_avx512bf16;
    case Isa::avx512vnni: return kernel_avx512vnni;
    case Isa::avx512: return kernel_avx512;
    case Isa::avx2: return kernel_avx2;
#endif
    default: return kernel_scalar;
  }
}

}  // namespace packed
}  // namespace lowbit
