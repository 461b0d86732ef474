// Launches of packed/batch_sm90.cuh.
#pragma once
#include "common/packed.h"
#include "cuda/batch_sm90.h"

namespace lowbit {
namespace cuda {
namespace packed_batch_sm90 {

using Call = Linear<packed::Weight>;

// Rows of x for a block.
inline int x_rows_of(const Call& call) { return call.M <= 64 ? 64 : 128; }

inline const char* declines(const Call& call, const Device& device) { return batch_sm90::declines(call, device); }

inline int splits_of(const Call& call, const Device& device) {
  return batch_sm90::splits_of(call, x_rows_of(call), device);
}

inline int64_t workspace_bytes(const Call& call, const Device& device) {
  return batch_sm90::workspace_bytes(call, splits_of(call, device));
}

// Compiled for each width.
template <int BITS>
int launch(const Call& call, const Device& device, void* workspace, Stream stream);

}  // namespace packed_batch_sm90
}  // namespace cuda
}  // namespace lowbit
