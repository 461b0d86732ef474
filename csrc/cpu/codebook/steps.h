// Int8 activations: fixed-point weights, and the step of each row.
//
// x[m,k] = q[m,k] / inverse[m]. The weights of row n, without their outliers, become integers of 16 bits:
//   step[n] = (max over groups |scale| * max over the row's tables |entry|) / 32767, 1 where that is below 2^-126
//   T[n,k] = round(w[n,k] * (1 / step[n])), halves to even, in -32767..32767
//   y[m,n] = (sum_k T[n,k] * q[m,k]) * step[n] / inverse[m] + outliers on x itself
// A lane sums at most kSlice / kLanes products of up to 32767 * 127: exact in int32.
#pragma once
#include "cpu/codebook/tables.h"
#include "cpu/quantizer.h"

namespace lowbit {
namespace codebook {
namespace {

static_assert(kSlice / kLanes * 32767 * 127 < int64_t(1) << 31, "the sum of a lane must fit int32");

LOWBIT_SHARED float largest_magnitude(const float* values, int64_t n, float largest) {
  const uint32_t found = largest_bits(values, n), before = bits_of(largest);
  return float_of(found > before ? found : before);
}

inline float step_of(float scale, float entry) {
  const float step = scale * entry / 32767;
  return step < 0x1p-126f ? 1 : step;
}

// `scratch` holds kMaxEntries floats.
LOWBIT_SHARED float row_step(const Weight& w, int64_t n, float* scratch) {
  float scale = w.scales ? 0 : 1, entry = 0;
  for (int64_t g0 = 0; w.scales && g0 < w.G; g0 += kMaxEntries) {
    const int64_t g1 = min64(g0 + kMaxEntries, w.G);
    load_scales(w, n, g0, g1, scratch);
    scale = largest_magnitude(scratch, g1 - g0, scale);
  }
  const int64_t begin = table_index(w, n, 0) * entries(w);
  const int64_t count = (w.tables == Weight::Tables::group ? w.G : 1) * entries(w);  // a row's tables follow each other
  for (int64_t i = 0; i < count; i += kMaxEntries) {
    const int64_t some = min64(kMaxEntries, count - i);
    to_float(w.codebook, w.codebook_dtype, begin + i, some, scratch);
    entry = largest_magnitude(scratch, some, entry);
  }
  return step_of(scale, entry);
}

}  // namespace
}  // namespace codebook
}  // namespace lowbit
