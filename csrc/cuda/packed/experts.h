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

constexpr int64_t DECODE_ROWS = 8, BATCH_ROWS = 32;  // of a tile, at most

// Decode takes up to 8 rows of an expert, if all that are met have as many, and float32. The kernels add in different
// orders: where a row of y may not depend on the others, batch takes every call.
inline bool takes_batch(const Call& call) {
  if (call.linear.dtype == DType::f32) return false;
  return call.linear.batch_invariant || call.S > DECODE_ROWS * std::max<int64_t>(1, std::min(call.S, call.E));
}

inline const char* declines(const Call& call, const Device& device) {
  if (const char* reason = experts::declines(call)) return reason;
  const packed::Weight& w = call.linear.weight;
  const int64_t rows = takes_batch(call) ? BATCH_ROWS : DECODE_ROWS;
  const Linear<packed::Weight> one = experts::of_one(call, rows);
  if (const char* reason = rows == BATCH_ROWS ? packed_batch::declines(one, device) : packed_decode::declines(one))
    return reason;
  // As if every row were a tile, of the kernel whose blocks are more.
  const int64_t tiles = call.S + call.E + 2, sums = w.G * ((call.linear.M + 63) / 64 * 64);
  if (tiles * decode::row_blocks(one.weight.N) >= experts::MOST_BLOCKS || sums >= experts::MOST_BLOCKS)
    return "experts take fewer than 2^31 blocks";
  return nullptr;
}

// Compiled for each width.
template <int BITS>
int64_t workspace_bytes(const Call& call, const Device& device);

template <int BITS>
int launch(const Call& call, const Device& device, void* workspace, Stream stream);

}  // namespace packed_experts
}  // namespace cuda
}  // namespace lowbit
