// Launches of packed/decode.cuh.
#pragma once
#include <algorithm>

#include "common/packed.h"
#include "cuda/decode.h"

namespace lowbit {
namespace cuda {
namespace packed_decode {

using namespace decode;

using Call = Linear<packed::Weight>;

inline const char* declines(const Call& call) {
  const packed::Weight& w = call.weight;
  if (call.M < 0 || (call.M > MOST_ROWS && call.dtype != DType::f32)) return "decode takes up to 16 rows of x";
  if (call.int8) return "decode has no int8 activations";
  if (w.K < 1 || w.K > MOST_COLUMNS) return "decode takes 1 to 2^20 columns";
  if (w.N < 0 || w.N * w.G >= MOST_VALUES) return "decode takes fewer than 2^31 groups";
  if (w.blocks || w.row_bytes != (w.K + TILE - 1) / TILE * 32 * w.bits) return "decode reads codes in tiles";
  if (!aligned(w.packed)) return "decode reads codes that begin at a multiple of 16 bytes";
  return nullptr;
}

// Compiled for each width.
template <int BITS>
int launch(const Call& call, const Device& device, void* workspace, Stream stream);

}  // namespace packed_decode
}  // namespace cuda
}  // namespace lowbit
