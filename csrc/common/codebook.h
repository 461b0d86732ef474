// The operand of the family `codebook`: raw pointers, no torch.
//   w[n,k] = codebook[tn, tg, code[n,k]] (* scale[n,g]) (+ outlier[n,k]),  g = k / group_size
#pragma once
#include "common/operands.h"

namespace lowbit {
namespace codebook {

// bitsandbytes' double quantization: scale[i] = codebook[scales[i]] * absmax[i / 256] + offset, i = n * G + g
struct Nested {
  const float *codebook, *absmax, *offset;
};

// Where nothing is stored per group, G = 1 and group_size = K, whatever group_size the caller passed.
struct Weight : Codes {
  const void* codebook;  // [tables, 2^bits], tables as `tables` says
  DType codebook_dtype;
  enum class Tables : uint8_t { tensor, row, group } tables;  // one; one per row, [N]; one per group, [N, G]
  const void* scales;  // [N, G]; null: none
  DType scales_dtype;  // u8: nested
  Nested nested;
};

}  // namespace codebook
}  // namespace lowbit
