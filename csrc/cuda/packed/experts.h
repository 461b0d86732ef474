// Launches of packed/experts.cuh.
#pragma once
#include "common/packed.h"
#include "cuda/experts.h"
#include "cuda/packed/batch.h"
#include "cuda/packed/decode.h"

namespace lowbit {
namespace cuda {
namespace packed_experts {

using Call = Experts<packed::Weight>;

using experts::BATCH_ROWS;
using experts::DECODE_ROWS;

// Else decode, which takes float32 alone.
inline bool takes_batch(const Call& call) { return call.linear.dtype != DType::f32 && experts::has_many_rows(call); }

inline const char* declines(const Call& call, const Device& device) {
  if (const char* reason = experts::declines(call)) return reason;
  const packed::Weight& w = call.linear.weight;
  if (w.G * (call.linear.M + 63) >= experts::MOST_BLOCKS) return "experts take fewer than 2^31 sums of x";
  return takes_batch(call) ? packed_batch::declines(experts::of_one(call, BATCH_ROWS), device)
                           : packed_decode::declines(experts::of_one(call, DECODE_ROWS));
}

// Compiled for each width.
template <int BITS>
int64_t workspace_bytes(const Call& call, const Device& device);

template <int BITS>
int launch(const Call& call, const Device& device, void* workspace, Stream stream);

}  // namespace packed_experts
}  // namespace cuda
}  // namespace lowbit
