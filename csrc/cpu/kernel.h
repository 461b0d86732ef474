// The table of a family's kernels on one instruction set: raw pointers, no torch.
#pragma once
#include "common/operands.h"
#include "cpu/isa.h"

// The build names the instruction set of an object: LOWBIT_ISA=avx2 makes LOWBIT_FOR_ISA(kernel) the name kernel_avx2.
#define LOWBIT_JOIN(name, isa) name##_##isa
#define LOWBIT_JOIN_VALUES(name, isa) LOWBIT_JOIN(name, isa)
#define LOWBIT_FOR_ISA(name) LOWBIT_JOIN_VALUES(name, LOWBIT_ISA)

// Declares a family's tables, one for each instruction set, and cpu_kernel(isa), which chooses one.
#if defined(__x86_64__)
#define LOWBIT_DECLARE_KERNELS(CpuKernel)                                                                  \
  extern const CpuKernel kernel_scalar, kernel_avx2, kernel_avx512, kernel_avx512vnni, kernel_avx512bf16;  \
  inline const CpuKernel& cpu_kernel(Isa isa) {                                                            \
    switch (isa) {                                                                                         \
      case Isa::avx512bf16: return kernel_avx512bf16;                                                      \
      case Isa::avx512vnni: return kernel_avx512vnni;                                                      \
      case Isa::avx512: return kernel_avx512;                                                              \
      case Isa::avx2: return kernel_avx2;                                                                  \
      default: return kernel_scalar;                                                                       \
    }                                                                                                      \
  }
#else
#define LOWBIT_DECLARE_KERNELS(CpuKernel)   \
  extern const CpuKernel kernel_scalar;     \
  inline const CpuKernel& cpu_kernel(Isa) { return kernel_scalar; }
#endif

namespace lowbit {

// One family on one instruction set.
// y[m,n] is the same to the last bit whatever the row's place in the batch, whatever the split of N and, where the call
// is batch_invariant, whatever M.
template <class Weight>
struct CpuKernel {
  int64_t (*prepared_bytes)(const Linear<Weight>&);
  // x rows [m0, m1) -> prepared: the activations as the kernel reads them
  void (*prepare)(const Linear<Weight>&, void* prepared, int64_t m0, int64_t m1);
  // y[:, n0:n1]
  void (*linear)(const Linear<Weight>&, const void* prepared, int64_t n0, int64_t n1);
  // out[0:K] = w[row, :]
  void (*dequantize)(const Weight&, int64_t row, DType dtype, void* out);
  int64_t row_tile;  // output rows taken at a time: N is split at multiples of it
};

}  // namespace lowbit
