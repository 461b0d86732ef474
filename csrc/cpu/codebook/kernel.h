// CPU kernels of the family `codebook`: raw pointers, no torch.
#pragma once
#include "common/codebook.h"
#include "cpu/kernel.h"

namespace lowbit {
namespace codebook {

using Linear = lowbit::Linear<Weight>;
using CpuKernel = lowbit::CpuKernel<Weight>;

LOWBIT_DECLARE_KERNELS(CpuKernel)

}  // namespace codebook
}  // namespace lowbit
