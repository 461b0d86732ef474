// Launches of packed/gather.cuh.
#pragma once
#include "common/packed.h"
#include "cuda/gather.h"

namespace lowbit {
namespace cuda {
namespace packed_gather {

using Call = Rows<packed::Weight>;

inline const char* declines(const Call& call) { return gather::declines(call); }

// Compiled for each width.
template <int BITS>
int launch(const Call& call, Stream stream);

}  // namespace packed_gather
}  // namespace cuda
}  // namespace lowbit
