// Launches of codebook/decode.cuh.
#pragma once
#include "common/codebook.h"
#include "cuda/decode.h"

namespace lowbit {
namespace cuda {
namespace codebook_decode {

using Call = Linear<codebook::Weight>;

// How codes become entries: from words in registers, or from tables in shared memory, of the entries of two codes each
// or of single ones.
enum class Look { registers, pairs, entries };

// Bytes of shared memory for the table of a row warp: a word for each thread of a warp and each entry, or pair.
template <Look LOOK, int BITS>
constexpr int TABLE_BYTES = LOOK == Look::registers ? 0 : 128 << (LOOK == Look::pairs ? 8 : BITS);

inline Look look_of(const codebook::Weight& w) {
  if (w.bits > 4) return Look::entries;
  return w.bits == 4 && w.tables == codebook::Weight::Tables::tensor ? Look::pairs : Look::registers;
}

// Whether the instances for groups that begin anywhere run a call: they take up to 8 rows of x.
inline bool any_groups(const codebook::Weight& w) {
  return decode::cuts_chunks(w) || (w.tables == codebook::Weight::Tables::group && w.G > 1);
}

inline int shared_bytes(const codebook::Weight& w, int rows) {
  const Look look = look_of(w);
  const int warps = w.tables == codebook::Weight::Tables::tensor ? 1 : decode::ROW_WARPS;
  const int tables = look == Look::registers ? 0
                     : look == Look::pairs   ? TABLE_BYTES<Look::pairs, 4>
                                             : warps * (TABLE_BYTES<Look::entries, 0> << w.bits);
  return tables + (rows <= 8 ? decode::ring_bytes<1>(rows) : decode::ring_bytes<2>(rows));
}

// Rows of x that one launch takes: as many as fit into shared memory. It does not change a row of y.
inline int rows_at_once(const codebook::Weight& w, const Device& device) {
  int rows = any_groups(w) ? 8 : static_cast<int>(decode::MOST_ROWS);
  while (rows > 0 && shared_bytes(w, rows) > device.shared_bytes) --rows;
  return rows;
}

inline const char* declines(const Call& call, const Device& device) {
  const codebook::Weight& w = call.weight;
  if (const char* reason = decode::declines(call)) return reason;
  if (w.bits > 4 && w.tables == codebook::Weight::Tables::group && w.G > 1)
    return "decode takes a table for every group up to 4 bits";
  if (rows_at_once(w, device) == 0) return "decode has no room for the tables in shared memory";
  return nullptr;
}

inline int64_t workspace_bytes(const Call& call, const Device& device) { return decode::workspace_bytes(call, device); }

// Compiled for each width.
template <int BITS>
int launch(const Call& call, const Device& device, void* workspace, Stream stream);

}  // namespace codebook_decode
}  // namespace cuda
}  // namespace lowbit
