// Rows of a weight of the family `codebook`, as a weight: an expert of a stack.
#pragma once
#include "common/checks.h"
#include "common/codebook.h"
#include "common/stack.h"

namespace lowbit {
namespace codebook {

constexpr int64_t kNestedBlock = 256;  // scales that share an absmax

// Refuses a stack whose experts, of N rows each, cannot be cut out of it.
inline void check_stack(const char* op, const Weight& stack, int64_t N) {
  LOWBIT_CHECK(!stack.nested.codebook || N * stack.G % kNestedBlock == 0, op, ": experts with quantized scales must ",
               "have a multiple of ", kNestedBlock, " scales: got N=", N, ", G=", stack.G);
}

inline Weight rows_of(const Weight& stack, int64_t first, int64_t N) {
  Weight w = stack;
  cut_codes(w, first, N);
  const auto moved = [](const void* values, DType dtype, int64_t count) {
    return static_cast<const char*>(values) + count * element_size(dtype);
  };
  if (w.scales) w.scales = moved(w.scales, w.scales_dtype, first * w.G);
  if (w.nested.codebook) w.nested.absmax += first * w.G / kNestedBlock;
  if (w.tables != Weight::Tables::tensor)
    w.codebook = moved(w.codebook, w.codebook_dtype, first * (w.tables == Weight::Tables::row ? 1 : w.G) << w.bits);
  return w;
}

}  // namespace codebook
}  // namespace lowbit
