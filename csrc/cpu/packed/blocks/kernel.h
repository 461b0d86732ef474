// CPU kernels of many rows of weights of the family `packed`: raw pointers, no torch.
#pragma once
#include "cpu/kernel.h"
#include "cpu/packed/weight.h"

namespace lowbit {
namespace packed {
namespace blocks {

struct CpuKernel {
  // out = w[n0:n1, :]; the rows of a block together
  void (*dequantize)(const CpuWeight& w, int64_t n0, int64_t n1, DType dtype, char* out);
};

LOWBIT_DECLARE_KERNELS(CpuKernel)

}  // namespace blocks
}  // namespace packed
}  // namespace lowbit
