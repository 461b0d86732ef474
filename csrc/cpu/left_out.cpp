// Empty tables of kernels for an instruction set that this build leaves out: LOWBIT_ISAS of setup.py. isa.cpp then says
// that no machine runs it.
#include "cpu/codebook/kernel.h"
#include "cpu/gradients/kernel.h"
#include "cpu/kron/kernel.h"
#include "cpu/packed/blocks/kernel.h"
#include "cpu/packed/kernel.h"

namespace lowbit {
namespace packed {
const CpuKernel LOWBIT_FOR_ISA(kernel){};
namespace blocks {
const CpuKernel LOWBIT_FOR_ISA(kernel){};
}
}
namespace codebook {
const CpuKernel LOWBIT_FOR_ISA(kernel){};
}
namespace gradients {
const CpuKernel LOWBIT_FOR_ISA(kernel){};
}
namespace kron {
const CpuKernel LOWBIT_FOR_ISA(kernel){};
#if LOWBIT_ALL_BF16
extern const CpuKernel kernel_all_bf16;
const CpuKernel kernel_all_bf16{};
#endif
}
}  // namespace lowbit
