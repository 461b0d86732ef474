// out[i, :] = W[ids[i], :] of the family `codebook`.
#pragma once
#include "cuda/library.h"

namespace lowbit {
namespace cuda {
namespace codebook_rows {

extern const Op<Rows<codebook::Weight>> OP;

}  // namespace codebook_rows
}  // namespace cuda
}  // namespace lowbit
