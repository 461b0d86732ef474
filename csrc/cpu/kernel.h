// The table of a family's kernels on one instruction set: raw pointers, no torch.
#pragma once
#include "common/operands.h"
#include "cpu/isa.h"

// The build names the instruction set of an object: LOWBIT_ISA=avx2 makes LOWBIT_FOR_ISA(kernel) the name kernel_avx2.
#define LOWBIT_JOIN(name, isa) name##_##isa
#define LOWBIT_JOIN_VALUES(name, isa) LOWBIT_JOIN(name, isa)
#define LOWBIT_FOR_ISA(name) LOWBIT_JOIN_VALUES(name, LOWBIT_ISA)

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

constexpr int64_t kPassRows = 384;  // of x, in one pass over the weights; a multiple of every tile

}  // namespace lowbit
