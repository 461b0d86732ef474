// y = x @ W.T + bias of the family `packed`: which of its kernels takes a call.
#pragma once
#include "cuda/library.h"

namespace lowbit {
namespace cuda {
namespace packed_linear {

extern const Op<Linear<packed::Weight>> OP;

}  // namespace packed_linear
}  // namespace cuda
}  // namespace lowbit
