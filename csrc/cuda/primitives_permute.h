// What kernels that look codes up in registers ask of a GPU beside primitives.h.
#pragma once
#include "cuda/primitives.h"

namespace lowbit {
namespace cuda {

// As permute_bytes(), one instruction: __byte_perm clears the top bits of nibbles first, unless they are constants.
LOWBIT_DEVICE uint32_t permute_bytes_by(uint32_t a, uint32_t b, uint32_t codes) {
#ifdef LOWBIT_EMULATED
  return permute_bytes(a, b, codes);
#else
  uint32_t d;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(codes));
  return d;
#endif
}

}  // namespace cuda
}  // namespace lowbit
