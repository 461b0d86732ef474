// Rows of a weight of the family `packed`, as a weight: an expert of a stack.
#pragma once
#include "common/checks.h"
#include "common/stack.h"
#include "cpu/packed/weight.h"

namespace lowbit {
namespace packed {

constexpr int64_t kRowsTogether = 64;  // of the layout `blocks`: a range that begins at a multiple is in it by itself

// Refuses a stack whose experts, of N rows each, cannot be cut out of it.
inline void check_stack(const char* op, const CpuWeight& stack, int64_t N) {
  LOWBIT_CHECK(!stack.blocks || N % kRowsTogether == 0, op, ": experts in blocks (layout=2) must have a multiple of ",
               kRowsTogether, " rows: got N=", N);
}

inline CpuWeight rows_of(const CpuWeight& stack, int64_t first, int64_t N) {
  CpuWeight w = stack;
  cut_codes(w, first, N);
  if (w.per_tensor) return w;
  const auto moved = [first](const void* values, DType dtype, int64_t row) {
    return static_cast<const char*>(values) + first * row * element_size(dtype);
  };
  w.scales = moved(w.scales, w.scales_dtype, w.scales_row);
  if (w.zeros) w.zeros = moved(w.zeros, w.zeros_dtype, w.zeros_row);
  if (w.scale_block) w.scale_factors = moved(w.scale_factors, w.factors_dtype, w.factors_row);
  if (w.zero_factors) w.zero_factors = moved(w.zero_factors, w.factors_dtype, w.factors_row);
  return w;
}

}  // namespace packed
}  // namespace lowbit
