// Launches of packed/batch.cuh.
#pragma once
#include "common/packed.h"
#include "cuda/batch.h"

namespace lowbit {
namespace cuda {
namespace packed_batch {

using Call = Linear<packed::Weight>;

constexpr int RESERVED = 2 * batch::ROWS * 4;  // in shared memory: what centers leave of the zeros of two groups

#ifdef __CUDACC__
__host__ __device__
#endif
inline int padded_rows(int M) {
  return (M + 63) / 64 * 64;
}

inline const char* declines(const Call& call, const Device& device) {
  if (const char* reason = batch::declines(call)) return reason;
  if (device.shared_bytes < 99 << 10) return "batch takes 99 KiB of shared memory";
  return nullptr;
}

// Compiled for each width.
template <int BITS>
int64_t workspace_bytes(const Call& call, const Device& device);

template <int BITS>
int launch(const Call& call, const Device& device, void* workspace, Stream stream);

}  // namespace packed_batch
}  // namespace cuda
}  // namespace lowbit
