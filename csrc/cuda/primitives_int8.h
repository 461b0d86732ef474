// What kernels with int8 activations ask of a GPU beside primitives.h. The emulation has it in emulated/emulation.h.
#pragma once
#include "cuda/primitives.h"

#ifndef LOWBIT_EMULATED
namespace lowbit {
namespace cuda {

// As multiply_bytes(); the bytes of a have a sign, too.
LOWBIT_DEVICE void multiply_signed_bytes(int32_t (&sums)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                         uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+r"(sums[0]), "+r"(sums[1]), "+r"(sums[2]), "+r"(sums[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

}  // namespace cuda
}  // namespace lowbit
#endif
