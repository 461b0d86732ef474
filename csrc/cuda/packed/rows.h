// out[i, :] = W[ids[i], :] of the family `packed`.
#pragma once
#include "cuda/library.h"

namespace lowbit {
namespace cuda {
namespace packed_rows {

extern const Op<Rows<packed::Weight>> OP;

}  // namespace packed_rows
}  // namespace cuda
}  // namespace lowbit
