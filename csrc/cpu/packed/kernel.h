// CPU kernels of the family `packed`: raw pointers, no torch.
#pragma once
#include "cpu/kernel.h"
#include "cpu/packed/weight.h"

namespace lowbit {
namespace packed {

using Linear = lowbit::Linear<CpuWeight>;
using CpuKernel = lowbit::CpuKernel<CpuWeight>;

LOWBIT_DECLARE_KERNELS(CpuKernel)

}  // namespace packed
}  // namespace lowbit
