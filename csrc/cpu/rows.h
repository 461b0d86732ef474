// Rows on their way in and out: packed codes to bytes, sums to results.
#pragma once
#include "common/operands.h"
#include "cpu/tuning.h"
#include "cpu/unpack.h"

namespace lowbit {
namespace {

// Codes [k0, k1) of row n land at out[k - k0]; k0 is a multiple of 32.
inline void unpack_row(const Codes& w, int64_t n, int64_t k0, int64_t k1, uint8_t* out) {
  const int64_t offset = n * w.row_bytes + k0 / 8 * w.bits, size = w.N * w.row_bytes;
  const int64_t bytes = ceil_div(k1 - k0, 8) * w.bits;
  // At M = 1 four rows take turns, so the hardware does not follow their streams. We fetch what this row needs after
  // the other three: its next slice, or the start of the row four further.
  const int64_t ahead = bytes + (k1 < w.K ? 0 : (kRowTile - 1) * w.row_bytes);
  unpack(w.packed + offset, w.packed + size, ahead, w.bits, k1 - k0, out);
}

// y[m0 + m, n0 + n] = round(acc[m * ld + n] + bias[n])
template <class Linear>
inline void write_result(const Linear& a, int64_t m0, int64_t m1, int64_t n0, int64_t n1, const float* bias, float* acc,
                         int64_t ld) {
  for (int64_t m = m0; m < m1; ++m, acc += ld) {
    if (a.bias)
      for (int64_t n = 0; n < n1 - n0; ++n) acc[n] += bias[n];
    from_float(acc, a.dtype, m * a.weight.N + n0, n1 - n0, a.y);
  }
}

}  // namespace
}  // namespace lowbit
