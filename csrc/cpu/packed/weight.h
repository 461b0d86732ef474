// The operand of the CPU kernels of the family `packed`: that of common/packed.h, and the forms that only they read.
//   minimum      w[n,k] = code[n,k] * scale[n,g] - minimum[n,g]: product and difference round once each
//   two levels   scale[n,g] = factor[n, g / block] * code of a scale; of a minimum likewise
//   packed zeros zero[n,g] is bits [g * bits, (g + 1) * bits) of a row of bytes, the lowest bit of a byte first
#pragma once
#include "common/packed.h"

namespace lowbit {
namespace packed {

struct CpuWeight : Weight {
  bool minimum;                // `zeros` holds minima
  bool packed_zeros;           // `zeros` is uint8 [N, ceil(G * bits / 8)]; zeros_group is from byte to byte
  int64_t scale_block;         // groups that share a factor: `scales` holds codes, and minima do; 0: one level
  bool signed_scales;          // their bytes are int8, not uint8; minima are always uint8
  const void* scale_factors;   // [N, F], F = ceil(G / scale_block); or [1, 1], where scale_block is G
  const void* zero_factors;    // as these; null unless minimum
  DType factors_dtype;
  int64_t factors_row;         // F; 0: one factor for all
};

}  // namespace packed
}  // namespace lowbit
