// The operands of the families with packed codes: raw pointers, no torch. Backends share them.
#pragma once
#include <cstdint>

#include "common/dtype.h"

namespace lowbit {

// A sparse matrix [N, K] in CSR form.
struct Outliers {
  const void* values;  // null: none
  DType dtype;
  const void* columns;  // uint16 (or int16, never negative) at any address; int32 when wide; rising in a row
  bool wide;
  const int32_t* rows;  // [N + 1]
  explicit operator bool() const { return values != nullptr; }
};

// The codes of a family's `Weight`. Their layout is canonical (lowbit/core/bitpack.py) or, for whole blocks of 16 rows,
// `blocks` (lowbit/backends/cpu/blocks.py).
struct Codes {
  int64_t N, K, G, group_size;  // G = ceil(K / group_size)
  int bits;
  const uint8_t* packed;  // [N, row_bytes], row_bytes = ceil(K / 32) * bits * 4
  int64_t row_bytes;
  bool blocks;
  Outliers outliers;
};

template <class Weight>
struct Linear {
  Weight weight;
  int64_t M;
  const void* x;  // [M, K], contiguous
  DType dtype;    // of x and y
  const void* bias;  // [N] or null
  DType bias_dtype;
  bool int8;             // int8 activations
  const float* x_scale;  // static activation scale; null: one per row of x, or
  int64_t x_group;       // > 0: one per row and this many columns
  bool batch_invariant;  // y[m, :] may not depend on M
  void* y;               // [M, N]
};

}  // namespace lowbit
