// Rows of packed codes, as codes of their own: an expert of a stack. Beside operands.h, which the kernels of GPUs include.
#pragma once
#include "common/operands.h"

namespace lowbit {

// Makes of codes their rows [first, first + N). Row pointers of outliers say where values are in the whole.
inline void cut_codes(Codes& w, int64_t first, int64_t N) {
  w.packed += first * w.row_bytes;
  w.N = N;
  if (w.outliers) w.outliers.rows += first;
}

}  // namespace lowbit
