// y = x @ W.T + bias of the family `codebook`: which of its kernels takes a call.
#pragma once
#include "cuda/library.h"

namespace lowbit {
namespace cuda {
namespace codebook_linear {

extern const Op<Linear<codebook::Weight>> OP;

}  // namespace codebook_linear
}  // namespace cuda
}  // namespace lowbit
