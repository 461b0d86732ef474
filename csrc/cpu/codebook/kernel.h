// CPU kernels of the family `codebook`: raw pointers, no torch.
#pragma once
#include "common/codebook.h"
#include "cpu/kernel.h"

namespace lowbit {
namespace codebook {

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

}  // namespace codebook
}  // namespace lowbit
