// y[i] = x[i / r] @ W[ids[i]].T + bias[ids[i]] of the family `packed`: which of its kernels takes a call.
#pragma once
#include "cuda/library.h"

namespace lowbit {
namespace cuda {
namespace packed_experts {

extern const Op<Experts<packed::Weight>> OP;

}  // namespace packed_experts
}  // namespace cuda
}  // namespace lowbit
