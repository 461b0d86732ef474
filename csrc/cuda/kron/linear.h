// y = x @ W.T + bias of the family `kron`: which of its kernels takes a call.
#pragma once
#include "common/kron.h"
#include "cuda/library.h"

namespace lowbit {
namespace cuda {
namespace kron_linear {

extern const Op<Linear<kron::Weight>> OP;

}  // namespace kron_linear
}  // namespace cuda
}  // namespace lowbit
