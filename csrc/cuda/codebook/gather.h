// Launches of codebook/gather.cuh.
#pragma once
#include "common/codebook.h"
#include "cuda/gather.h"

namespace lowbit {
namespace cuda {
namespace codebook_gather {

using Call = Rows<codebook::Weight>;

inline const char* declines(const Call& call) { return gather::declines(call); }

// Compiled for each width.
template <int BITS>
int launch(const Call& call, Stream stream);

}  // namespace codebook_gather
}  // namespace cuda
}  // namespace lowbit
