// Launches of codebook/decode_simt.cuh.
#pragma once
#include "common/codebook.h"
#include "cuda/decode.h"

namespace lowbit {
namespace cuda {
namespace codebook_decode_simt {

using Call = Linear<codebook::Weight>;

constexpr int X_ROWS = 8;                  // rows of x of one launch, at most
constexpr int SUMS = 4 * decode::K_WARPS;  // that are made of an element of y

// Whether a call is this kernel's, by x and by the tables: decode has the others.
inline bool takes(const Call& call) {
  const codebook::Weight& w = call.weight;
  return call.dtype == DType::f32 || (w.bits > 4 && w.tables == codebook::Weight::Tables::group && w.G > 1);
}

// Bytes of shared memory for one table: of each entry a copy for every thread of a warp. Other tables stay where they
// are.
inline int table_bytes(const codebook::Weight& w, DType dtype) {
  return dtype == DType::f32 && w.tables == codebook::Weight::Tables::tensor ? 128 << w.bits : 0;
}

inline int shared_bytes(const codebook::Weight& w, DType dtype, int rows) {
  const int x = dtype == DType::f32 ? decode::STAGES_OF<1, float> * rows * decode::PITCH_OF<float>
                                    : decode::STAGES_OF<1> * rows * decode::PITCH_OF<>;
  return table_bytes(w, dtype) + std::max(x, SUMS * X_ROWS * decode::ROWS * 4);
}

// Rows of x that one launch takes: as many as fit into shared memory. It does not change a row of y.
inline int rows_at_once(const Call& call, const Device& device) {
  int rows = X_ROWS;
  while (rows > 0 && shared_bytes(call.weight, call.dtype, rows) > device.shared_bytes) --rows;
  return rows;
}

inline const char* declines(Call call, const Device& device) {
  if (rows_at_once(call, device) == 0) return "decode has no room for a row of x in shared memory";
  // What else decode asks of a weight. Any number of rows of float32 is taken.
  if (call.dtype == DType::f32) call.dtype = DType::f16, call.M = std::min(call.M, decode::MOST_ROWS);
  return decode::declines(call);
}

// float32 [splits, rows at a time, N]
inline int64_t workspace_bytes(const Call& call, const Device& device) {
  const int64_t splits = decode::splits_of(call.weight, device);
  return splits > 1 ? splits * std::min<int64_t>(call.M, X_ROWS) * call.weight.N * 4 : 0;
}

// Compiled for each width.
template <int BITS>
int launch(const Call& call, const Device& device, void* workspace, Stream stream);

}  // namespace codebook_decode_simt
}  // namespace cuda
}  // namespace lowbit
