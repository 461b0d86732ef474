// Launches of codebook/batch.cuh.
#pragma once
#include "common/codebook.h"
#include "cuda/batch.h"

namespace lowbit {
namespace cuda {
namespace codebook_batch {

using Call = Linear<codebook::Weight>;

constexpr int RESERVED = 0;  // tables are after the ring

// Bytes of the tables of ROWS rows, of two rows in a word, or of 2^copies copies of the one table, an entry in a word.
inline int table_bytes(const codebook::Weight& w, int copies) {
  return w.tables == codebook::Weight::Tables::tensor ? 4 << (w.bits + copies) : batch::ROWS * 2 << w.bits;
}

// Compiled for each width.
template <int BITS>
const char* declines(const Call& call, const Device& device);

template <int BITS>
int64_t workspace_bytes(const Call& call, const Device& device);

template <int BITS>
int launch(const Call& call, const Device& device, void* workspace, Stream stream);

}  // namespace codebook_batch
}  // namespace cuda
}  // namespace lowbit
