// y[i] = x[i / r] @ W[ids[i]].T + bias[ids[i]] of the family `codebook`: which of its kernels takes a call.
#pragma once
#include "cuda/library.h"

namespace lowbit {
namespace cuda {
namespace codebook_experts {

extern const Op<Experts<codebook::Weight>> OP;

}  // namespace codebook_experts
}  // namespace cuda
}  // namespace lowbit
