// Launches of codebook/experts.cuh.
#pragma once
#include "common/codebook.h"
#include "cuda/codebook/batch.h"
#include "cuda/codebook/decode.h"
#include "cuda/experts.h"

namespace lowbit {
namespace cuda {
namespace codebook_experts {

using Call = Experts<codebook::Weight>;

using experts::BATCH_ROWS;
using experts::DECODE_ROWS;

constexpr int64_t NESTED_BLOCK = 256;  // scales that share an absmax

// Else decode, which takes tables of groups up to 4 bits.
inline bool takes_batch(const Call& call) {
  const codebook::Weight& w = call.linear.weight;
  const bool large_tables = w.bits > 4 && w.tables == codebook::Weight::Tables::group && w.G > 1;
  return large_tables || experts::has_many_rows(call);
}

// Compiled for each width.
template <int BITS>
const char* declines(const Call& call, const Device& device);

template <int BITS>
int64_t workspace_bytes(const Call& call, const Device& device);

template <int BITS>
int launch(const Call& call, const Device& device, void* workspace, Stream stream);

}  // namespace codebook_experts
}  // namespace cuda
}  // namespace lowbit
