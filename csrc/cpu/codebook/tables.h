// Tables and scales of a weight as floats, and helpers of the look-ups of table_look_up.h.
#pragma once
#include "cpu/codebook/kernel.h"
#include "cpu/codebook/tuning.h"
#include "cpu/simd.h"

namespace lowbit {
namespace codebook {
namespace {

constexpr int64_t kMaxEntries = 256;

inline int64_t entries(const Weight& w) { return int64_t(1) << w.bits; }

// The place in `codebook` of the table that group g of row n uses.
inline int64_t table_index(const Weight& w, int64_t n, int64_t g) {
  return w.tables == Weight::Tables::tensor ? 0 : w.tables == Weight::Tables::row ? n : n * w.G + g;
}

// A table as floats, repeated until it has at least 16 entries: those of one register.
LOWBIT_SHARED void load_table(const Weight& w, int64_t index, float* out) {
  const int64_t count = entries(w);
  to_float(w.codebook, w.codebook_dtype, index * count, count, out);
  for (int64_t i = count; i < 16; ++i) out[i] = out[i - count];
}

// scale[g - g0] of row n for groups [g0, g1)
LOWBIT_SHARED void load_scales(const Weight& w, int64_t n, int64_t g0, int64_t g1, float* scale) {
  const int64_t begin = n * w.G + g0, count = g1 - g0;
  if (!w.scales) {
    for (int64_t g = 0; g < count; ++g) scale[g] = 1;
  } else if (w.scales_dtype == DType::u8) {
    const uint8_t* codes = static_cast<const uint8_t*>(w.scales) + begin;
    for (int64_t g = 0; g < count;) {
      const float absmax = w.nested.absmax[(begin + g) / 256], offset = *w.nested.offset;
      for (const int64_t end = min64(count, g + 256 - (begin + g) % 256); g < end; ++g)
        scale[g] = w.nested.codebook[codes[g]] * absmax + offset;
    }
  } else {
    to_float(w.scales, w.scales_dtype, begin, count, scale);
  }
}

// out[i] = round(values[i] * inverse), halves to even, in -32767..32767
inline void to_fixed(const float* values, int64_t n, float inverse, int16_t* out) {
  int64_t i = round_vectors(values, n, inverse, 32767.0f, out);
  const float round = 12582912;  // 1.5 * 2^23, see Quantizer
  for (; i < n; ++i) {
    float v = values[i] * inverse;
    v = v < 32767 ? v : 32767;
    v = v > -32767 ? v : -32767;
    out[i] = int16_t(v + round - round);
  }
}

// Calls step(codes, out) for kStep codes at a time. The last call may write past n, so it writes to a copy.
template <int kStep, class Element, class Step>
inline void in_steps(const uint8_t* codes, int64_t n, Element* out, Step step) {
  int64_t i = 0;
  for (; i + kStep <= n; i += kStep) step(codes + i, out + i);
  if (i == n) return;
  Element rest[kStep];
  step(codes + i, rest);
  std::memcpy(out + i, rest, size_t(n - i) * sizeof(Element));
}

}  // namespace
}  // namespace codebook
}  // namespace lowbit
