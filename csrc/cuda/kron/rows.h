// out[i, :] = W[ids[i], :] of the family `kron`.
#pragma once
#include "common/kron.h"
#include "cuda/library.h"

namespace lowbit {
namespace cuda {
namespace kron_rows {

extern const Op<Rows<kron::Weight>> OP;

}  // namespace kron_rows
}  // namespace cuda
}  // namespace lowbit
