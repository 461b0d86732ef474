// Launches of packed/decode_int8.cuh.
#pragma once
#include "common/packed.h"
#include "cuda/decode.h"
#include "cuda/int8.h"

namespace lowbit {
namespace cuda {
namespace packed_decode_int8 {

using Call = Linear<packed::Weight>;

// The bytes of a row of a slice of x in shared memory. With 32 bytes between, four rows are in different banks.
constexpr int PITCH = decode::SLICE + 32;

template <int M_TILES>
int shared_bytes(int rows_of_x, bool outliers) {
  const int x = decode::STAGES_OF<M_TILES> * rows_of_x * PITCH, sums = decode::K_WARPS * decode::ROWS * 8 * M_TILES * 4;
  return std::max(x, sums) + (outliers ? sums : 0);
}

// Rows of x that one launch takes. It does not change a row of y.
inline int64_t rows_at_once(const Call& call) { return decode::cuts_chunks(call.weight) ? 8 : decode::MOST_ROWS; }

inline const char* declines(const Call& call) {
  const packed::Weight& w = call.weight;
  if (const char* reason = int8::declines(call)) return reason;
  if (call.M < 0 || call.M >= int64_t(1) << 24) return "decode takes fewer than 2^24 rows of x";
  if (w.K < 1 || w.K > decode::MOST_COLUMNS) return "decode takes 1 to 2^20 columns";
  if (w.N < 0 || w.N * w.G >= decode::MOST_VALUES) return "decode takes fewer than 2^31 groups";
  if (w.blocks || w.row_bytes != (w.K + TILE - 1) / TILE * 32 * w.bits) return "decode reads codes in tiles";
  if (!decode::aligned(w.packed)) return "decode reads codes that begin at a multiple of 16 bytes";
  return nullptr;
}

// [splits, rows, N] of sums, and as many of outliers
inline int64_t parts_bytes(const Call& call, const Device& device) {
  const int splits = decode::splits_of(call.weight, device);
  return splits > 1 ? splits * std::min(call.M, rows_at_once(call)) * call.weight.N * 4 : 0;
}

// x as int8, then the splits.
inline int64_t workspace_bytes(const Call& call, const Device& device) {
  return int8::quantized_bytes(call.M, call.weight.K) + parts_bytes(call, device) * (call.weight.outliers ? 2 : 1);
}

// Compiled for each width.
template <int BITS>
int launch(const Call& call, const Device& device, void* workspace, Stream stream);

}  // namespace packed_decode_int8
}  // namespace cuda
}  // namespace lowbit
