// Launches of codebook/linear_int8.cuh.
#pragma once
#include "common/codebook.h"
#include "cuda/decode.h"
#include "cuda/int8.h"

namespace lowbit {
namespace cuda {
namespace codebook_linear_int8 {

using Call = Linear<codebook::Weight>;

// The bytes of a row of a slice of x in shared memory. With 32 bytes between, four rows are in different banks.
constexpr int PITCH = decode::SLICE + 32;
constexpr int64_t SPLIT_ROWS = 512;  // rows of x whose splits are in the workspace at a time

// Rows of x of a block.
inline int x_rows_of(const Call& call) { return call.M <= 8 ? 8 : 32; }

// Bytes of the tables in shared memory, a word for each entry: one table, with a copy for each thread of a warp; or those
// of the rows of a block. Tables of groups stay where they are.
inline int table_bytes(const codebook::Weight& w) {
  if (w.tables == codebook::Weight::Tables::group && w.G > 1) return 0;
  const bool one = w.tables == codebook::Weight::Tables::tensor && (w.scales == nullptr || w.G > 1);
  static_assert(decode::ROWS == 32, "as many copies as rows");
  return (one ? 32 : decode::ROWS) * 4 << w.bits;
}

inline int shared_bytes(const codebook::Weight& w, int x_rows) {
  const int stages = x_rows == 8 ? decode::STAGES_OF<1> : decode::STAGES_OF<4>;
  const int x = stages * x_rows * PITCH, sums = 2 * decode::K_WARPS * decode::ROWS * x_rows * 4;
  return table_bytes(w) + std::max(x, sums);
}

inline const char* declines(const Call& call, const Device& device) {
  const codebook::Weight& w = call.weight;
  if (call.M < 0 || call.M >= int64_t(1) << 24) return "int8 activations have fewer than 2^24 rows";
  if (w.K < 1 || w.K > decode::MOST_COLUMNS) return "int8 activations have 1 to 2^20 columns";
  if (w.N < 0 || w.N * w.G >= decode::MOST_VALUES) return "int8 activations meet fewer than 2^31 groups";
  if (w.blocks || w.row_bytes != (w.K + TILE - 1) / TILE * 32 * w.bits) return "int8 activations meet codes in tiles";
  if (!decode::aligned(w.packed)) return "int8 activations meet codes that begin at a multiple of 16 bytes";
  if (shared_bytes(w, x_rows_of(call)) > device.shared_bytes)
    return "int8 activations have no room for the tables in shared memory";
  return nullptr;
}

// Blocks for all processors, and two slices of K at least for each; no more columns than an int32 has room for. The sums
// are integers: however they are split, they are the same.
inline int splits_of(const Call& call, const Device& device) {
  const codebook::Weight& w = call.weight;
  const int64_t slices = (w.K + decode::SLICE - 1) / decode::SLICE, most = int8::MOST_COLUMNS / decode::SLICE;
  const int64_t x_rows = x_rows_of(call), blocks = (call.M + x_rows - 1) / x_rows * decode::row_blocks(w.N);
  const int64_t wanted = std::min({device.processors / std::max<int64_t>(1, blocks), slices / 2, decode::MOST_SPLITS});
  return static_cast<int>(std::max({int64_t(1), wanted, (slices + most - 1) / most}));
}

// Rows of x of one launch.
inline int64_t rows_at_once(const Call& call, int splits) {
  return splits > 1 ? std::min(call.M, SPLIT_ROWS) : call.M;
}

inline int64_t steps_bytes(const Call& call) { return (4 * call.weight.N + 15) / 16 * 16; }

// x as int8, the steps of rows, then the splits.
inline int64_t workspace_bytes(const Call& call, const Device& device) {
  const int splits = splits_of(call, device);
  const int64_t parts = splits > 1 ? int64_t(8) * splits * rows_at_once(call, splits) * call.weight.N : 0;
  return int8::quantized_bytes(call.M, call.weight.K) + steps_bytes(call) + parts;
}

// Compiled for each width.
template <int BITS>
int launch(const Call& call, const Device& device, void* workspace, Stream stream);

}  // namespace codebook_linear_int8
}  // namespace cuda
}  // namespace lowbit
