// CPU kernels of the family `packed`: raw pointers, no torch.
#pragma once
#include "common/packed.h"
#include "cpu/kernel.h"

namespace lowbit {
namespace packed {

using Linear = lowbit::Linear<Weight>;
using CpuKernel = lowbit::CpuKernel<Weight>;

LOWBIT_DECLARE_KERNELS(CpuKernel)

}  // namespace packed
}  // namespace lowbit
