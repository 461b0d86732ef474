// Launches of codebook/batch_sm90.cuh.
#pragma once
#include "common/codebook.h"
#include "cuda/batch_sm90.h"

namespace lowbit {
namespace cuda {
namespace codebook_batch_sm90 {

using Call = Linear<codebook::Weight>;

// Rows of x for a block. Beside 128 of them, tables of rows of 256 entries have no room.
inline int x_rows_of(const Call& call) {
  const bool large = call.weight.bits == 8 && call.weight.tables != codebook::Weight::Tables::tensor;
  return call.M <= 64 || large ? 64 : 128;
}

inline const char* declines(const Call& call, const Device& device) {
  if (call.weight.tables == codebook::Weight::Tables::group && call.weight.G > 1)
    return "batch_sm90 takes one table, or one for each row";
  return batch_sm90::declines(call, device);
}

inline int splits_of(const Call& call, const Device& device) {
  return batch_sm90::splits_of(call, x_rows_of(call), device);
}

inline int64_t workspace_bytes(const Call& call, const Device& device) {
  return batch_sm90::workspace_bytes(call, splits_of(call, device));
}

// Compiled for each width.
template <int BITS>
int launch(const Call& call, const Device& device, void* workspace, Stream stream);

}  // namespace codebook_batch_sm90
}  // namespace cuda
}  // namespace lowbit
