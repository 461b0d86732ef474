// Rows of weights of the family `packed` as floats.
#pragma once
#include "cpu/blocks_layout.h"
#include "cpu/outliers.h"
#include "cpu/packed/kernel.h"
#include "cpu/packed/tuning.h"
#include "cpu/rows.h"

namespace lowbit {
namespace packed {
namespace {

// values[i] *= the factor of row n and group g0 + i, i < count
inline void times_factors(const CpuWeight& w, const void* factors, int64_t n, int64_t g0, int64_t count, float* values) {
  for (int64_t i = 0; i < count;) {
    const int64_t block = (g0 + i) / w.scale_block, end = min64(count, (block + 1) * w.scale_block - g0);
    float factor;
    to_float(factors, w.factors_dtype, n * w.factors_row + block, 1, &factor);
    for (; i < end; ++i) values[i] *= factor;
  }
}

// zero[g - g0] of row n for groups [g0, g0 + count), as they are stored: minima may be codes
inline void load_zeros(const CpuWeight& w, int64_t n, int64_t g0, int64_t count, float* zero) {
  if (!w.packed_zeros)
    return to_floats(w.zeros, w.zeros_dtype, n * w.zeros_row + g0 * w.zeros_group, w.zeros_group, count, zero);
  const uint8_t* row = static_cast<const uint8_t*>(w.zeros) + n * w.zeros_row;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t bit = (g0 + i) * w.bits, byte = bit / 8, shift = bit % 8;
    int32_t field = row[byte * w.zeros_group];
    if (shift + w.bits > 8) field |= row[(byte + 1) * w.zeros_group] << 8;
    zero[i] = float(field >> shift & ((1 << w.bits) - 1));
  }
}

// int8 from uint8, as floats
inline void with_signs(float* values, int64_t count) {
  for (int64_t i = 0; i < count; ++i) values[i] = values[i] > 127.0f ? values[i] - 256.0f : values[i];
}

// scale[g - g0], zero[g - g0] of row n for groups [g0, g1); zeros may be minima
inline void load_groups(const CpuWeight& w, int64_t n, int64_t g0, int64_t g1, float* scale, float* zero) {
  const int64_t row = w.per_tensor ? 0 : n, count = g1 - g0;
  to_floats(w.scales, w.scales_dtype, row * w.scales_row + g0 * w.scales_group, w.scales_group, count, scale);
  if (w.zeros) {
    load_zeros(w, row, g0, count, zero);
  } else {
    for (int64_t g = 0; g < count; ++g) zero[g] = float(1 << (w.bits - 1));
  }
  if (!w.scale_block) return;
  if (w.signed_scales) with_signs(scale, count);
  times_factors(w, w.scale_factors, row, g0, count, scale);
  if (w.zero_factors) times_factors(w, w.zero_factors, row, g0, count, zero);
}

// out[i] = (codes[i] - zero) * scale, or codes[i] * scale - zero of a minimum. The subtraction and the product round
// once each, in every variant.
inline void dequantize_run(const uint8_t* codes, int64_t n, int bits, bool minimum, float zero, float scale,
                           float* out) {
  int64_t i = 0;
  if constexpr (kHasAvx2) {
    const Float z = splat(zero), s = splat(scale);
    const auto value = [=](Float code) { return minimum ? code * s - z : (code - z) * s; };
    const Float table = value(to_float(iota()));
    const bool in_table = 1 << bits <= kLanes;  // all the values a code can take fit one register
    const auto values = [&](const uint8_t* at) {
      const Int c = load_codes(at);
      return in_table ? entry(table, c) : value(to_float(c));
    };
    for (; i + kLanes <= n; i += kLanes) store(out + i, values(codes + i));
    if (kHasAvx512 && i < n) return store_some(out + i, values(codes + i), n - i);
  }
  for (; i < n; ++i) {
    const float code = float(codes[i]);
    out[i] = minimum ? code * scale - zero : (code - zero) * scale;
  }
}

// The codes of a row as bytes, in either layout. k0 is a multiple of 32; up to kUnpackSlack codes behind k1 are written
// too.
inline void row_codes(const Weight& w, int64_t n, int64_t k0, int64_t k1, uint8_t* out) {
  in_block(w, n) ? block_row_codes(w, n, k0, k1, out) : unpack_row(w, n, k0, k1, out);
}

// The same as dequantize_codes() for canonical codes whose groups are whole vectors: codes stay in registers. Where
// kHasVnni; without minima, scales of one level.
template <class Unpack>
inline void dequantize_vectors(const CpuWeight& w, int64_t n, int64_t k0, int64_t k1, float* out) {
  const Unpack unpack(w.bits);
  const uint8_t* src = w.packed + n * w.row_bytes + k0 / 8 * w.bits;
  const Float codes_in_order = to_float(iota());
  Float scales = splat(0.0f), zeros = scales;  // of 16 groups
  for (int64_t k = k0, g = k0 / w.group_size, i = 0; k < k1; ++g, i = (i + 1) % kLanes) {
    if (i == 0) {
      const int64_t row = w.per_tensor ? 0 : n, some = min64(kLanes, w.G - g);
      scales = some_floats(w.scales, w.scales_dtype, row * w.scales_row + g * w.scales_group, w.scales_group, some);
      if (w.packed_zeros) {
        float values[kLanes] = {};
        load_zeros(w, row, g, some, values);
        zeros = load(values);
      } else {
        zeros = w.zeros
                    ? some_floats(w.zeros, w.zeros_dtype, row * w.zeros_row + g * w.zeros_group, w.zeros_group, some)
                    : splat(float(1 << (w.bits - 1)));
      }
    }
    const Int lane = splat(int32_t(i));
    const Float z = entry(zeros, lane), s = entry(scales, lane);
    const Float table = (codes_in_order - z) * s;
    for (const int64_t end = min64((g + 1) * w.group_size, k1); k < end; k += 64, src += 8 * w.bits, out += 64) {
      const auto codes = unpack.read(src, end - k);
      LOWBIT_UNROLL for (int v = 0; v < 4; ++v) {
        const Int c = codes.lanes(v);
        const Float value = w.bits <= 4 ? entry(table, c) : (to_float(c) - z) * s;
        const int64_t left = end - k - v * kLanes;
        if (left > 0) store_some(out + v * kLanes, value, left);
      }
    }
  }
}

// out[k - k0] = w[n, k] without its outliers, k0 <= k < k1, of codes[k - k0]; k1 - k0 is at most kSlice
inline void dequantize_unpacked(const CpuWeight& w, int64_t n, int64_t k0, int64_t k1, const uint8_t* codes,
                                float* out) {
  float scale[kGroupsAtOnce], zero[kGroupsAtOnce];
  const int64_t g0 = k0 / w.group_size;
  for (int64_t k = k0, g = g0; k < k1; ++g) {
    const int64_t end = min64((g + 1) * w.group_size, k1), i = (g - g0) % kGroupsAtOnce;
    if (i == 0) load_groups(w, n, g, min64(g + kGroupsAtOnce, w.G), scale, zero);
    dequantize_run(codes + (k - k0), end - k, w.bits, w.minimum, zero[i], scale[i], out + (k - k0));
    k = end;
  }
}

// out[k - k0] = w[n, k] without its outliers, k0 <= k < k1; k0 is a multiple of 32, k1 - k0 at most kSlice
inline void dequantize_codes(const CpuWeight& w, int64_t n, int64_t k0, int64_t k1, float* out) {
  if constexpr (kHasVnni)
    if (!in_block(w, n) && (w.G == 1 || w.group_size % 64 == 0) && !w.minimum && !w.scale_block)
      return dequantize_vectors<Unpack64>(w, n, k0, k1, out);
  uint8_t codes[kSlice + kUnpackSlack];
  row_codes(w, n, k0, k1, codes);
  dequantize_unpacked(w, n, k0, k1, codes, out);
}

void dequantize(const CpuWeight& w, int64_t n, DType dtype, void* out) {
  const Outliers& o = w.outliers;
  int64_t next = o ? o.rows[n] : 0;
  const int64_t end = o ? o.rows[n + 1] : 0;
  float values[kSlice];
  for (int64_t k0 = 0; k0 < w.K; k0 += kSlice) {
    const int64_t k1 = min64(k0 + kSlice, w.K);
    float* to = dtype == DType::f32 ? static_cast<float*>(out) + k0 : values;
    dequantize_codes(w, n, k0, k1, to);
    for (; next < end && outlier_column(o, next) < k1; ++next)
      to[outlier_column(o, next) - k0] += outlier_value(o, next);
    if (to == values) from_float(values, dtype, k0, k1 - k0, out);
  }
}

}  // namespace
}  // namespace packed
}  // namespace lowbit
