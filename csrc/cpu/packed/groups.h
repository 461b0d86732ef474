// The scales and zeros of the rows of a panel, as register tiles read them.
//
// Beside minima a weight is `code * scale - minimum`. Lanes then have a center, an integer near minimum / scale, and
// shift = minimum - center * scale, so that the weight is (code - center) * scale - shift and neither part is much larger
// than it. That must be the same number: where center * scale, the difference, or a product of scale could be rounded, the
// center is 0 and the shift the minimum.
#pragma once
#include "cpu/arena.h"
#include "cpu/packed/dequantize.h"
#include "cpu/packed/kernel.h"
#include "cpu/packed/schedule.h"

namespace lowbit {
namespace packed {
namespace {

class PanelGroups {
 public:
  PanelGroups(Arena& arena, const CpuWeight& w, const Schedule& p)
      : w_(w),
        p_(p),
        scale_lanes_(arena.take<float>((p.slice + kGroupsAtOnce) * kPanelN)),
        zero_lanes_(arena.take<float>((p.slice + kGroupsAtOnce) * kPanelN)),
        shift_lanes_(arena.take<float>(w.minimum ? (p.slice + kGroupsAtOnce) * kPanelN : 0)),
        factor_lanes_(arena.take<float>(w.scale_block ? (p.slice + 1 + kGroupsAtOnce) * kPanelN : 0)),
        middle_(arena.take<float>(kPanelN)),
        values_(arena.take<float>(kBlockRows * kGroupsAtOnce)) {
    if (arena.counting()) return;
    for (int64_t i = 0; i < kPanelN; ++i) middle_[i] = float(1 << (w.bits - 1));
  }

  StoredLanes scale{}, zero{}, shift{};

  // Loads those of rows [n0, n1) for the groups of segments [s0, s1). in_place: a whole panel's that are stored group
  // after group, as kernels take them, are not copied.
  void load(int64_t n0, int64_t n1, int64_t s0, int64_t s1, bool in_place) {
    n0_ = n0;
    n1_ = n1;
    in_place &= !w_.minimum && !w_.scale_block;
    const int64_t g0 = p_.group(s0), g1 = p_.group(s1 - 1) + 1;
    // codes of scales, group after group in memory, whose rows have one factor each
    const bool scaled =
        w_.scale_block >= w_.G && !w_.signed_scales && w_.scales_group > 1 && n1 - n0 == kPanelN;
    scale = scaled ? scaled_codes(g0, g1)
                   : lanes_of(w_.scales, w_.scales_dtype, w_.scales_row, w_.scales_group, g0, g1, in_place,
                              scale_lanes_);
    zero = w_.packed_zeros ? packed_zeros(g0, g1)
           : w_.zeros
               ? lanes_of(w_.zeros, w_.zeros_dtype, w_.zeros_row, w_.zeros_group, g0, g1, in_place, zero_lanes_)
               : StoredLanes{middle_, DType::f32, 0};
    if (w_.scale_block) {
      if (w_.signed_scales) with_signs(scale_lanes_, (g1 - g0) * kPanelN);
      if (!scaled) times_factors(w_.scale_factors, g0, g1, scale_lanes_);
      if (w_.zero_factors) times_factors(w_.zero_factors, g0, g1, zero_lanes_);
    }
    if (!w_.minimum) return;
    split_minima((w_.per_tensor ? 1 : g1 - g0) * kPanelN);
    shift = {shift_lanes_ + (static_cast<const float*>(zero.values) - zero_lanes_), DType::f32, zero.step};
  }

 private:
  // In place, or copied to `lanes`: [g1 - g0, kPanelN].
  StoredLanes lanes_of(const void* values, DType dtype, int64_t row, int64_t group, int64_t g0, int64_t g1,
                       bool in_place, float* lanes) {
    const int64_t n0 = n0_, rows = n1_ - n0, size = element_size(dtype);
    const bool by_group = group > 1 || row == 1;  // in memory
    if (w_.per_tensor) {
      to_float(values, dtype, 0, 1, lanes);
      for (int64_t i = 1; i < kPanelN; ++i) lanes[i] = lanes[0];
      return {lanes, DType::f32, 0};
    }
    if (by_group && rows == kPanelN) {
      const StoredLanes stored{static_cast<const uint8_t*>(values) + n0 * size, dtype, group};
      if (in_place) return stored;
      for (int64_t g = g0; g < g1; ++g) {
        stored.prefetch(g, kPanelN, kPanelN);  // of the next panel
        for (int64_t i = 0; i < kPanelN; i += kLanes) store(lanes + (g - g0) * kPanelN + i, stored.at(g, i));
      }
      return {lanes - g0 * kPanelN, DType::f32, kPanelN};
    }
    by_rows(g0, g1, lanes, [=](int64_t n, int64_t g, int64_t count, float* to) {
      to_floats(values, dtype, n * row + g * group, group, count, to);
    });
    return {lanes - g0 * kPanelN, DType::f32, kPanelN};
  }

  // lanes [g1 - g0, kPanelN] of what load(n, g, count, to) gives of a row n and some groups
  template <class Load>
  void by_rows(int64_t g0, int64_t g1, float* lanes, const Load& load) {
    const int64_t n0 = n0_, rows = n1_ - n0;
    for (int64_t g = g0; g < g1; g += kGroupsAtOnce) {
      const int64_t count = min64(kGroupsAtOnce, g1 - g);
      for (int64_t r = 0; r < rows; r += kBlockRows) {
        const int64_t some = min64(kBlockRows, rows - r);
        for (int64_t i = 0; i < some; ++i) load(n0 + r + i, g, count, values_ + i * kGroupsAtOnce);
        transpose16(values_, some, lanes + (g - g0) * kPanelN + r, kPanelN);
      }
    }
  }

  // Those of `bits` bits, in zero_lanes_. Bytes of a whole panel that stand byte after byte are read as vectors.
  LOWBIT_SHARED StoredLanes packed_zeros(int64_t g0, int64_t g1) {
    if (w_.zeros_row == 1 && n1_ - n0_ == kPanelN) {
      const int64_t step = w_.zeros_group;
      const uint8_t* first = static_cast<const uint8_t*>(w_.zeros) + n0_;
      const int32_t mask = (1 << w_.bits) - 1;
      for (int64_t g = g0; g < g1; ++g) {
        const int64_t bit = g * w_.bits;
        const int shift = int(bit % 8);
        const uint8_t* bytes = first + bit / 8 * step;
        const bool two = shift + w_.bits > 8;
        float* to = zero_lanes_ + (g - g0) * kPanelN;
        __builtin_prefetch(bytes + (two ? step : 0) + kPanelN);  // of the next panel
#if defined(__AVX512F__)
        const __m128i count = _mm_cvtsi32_si128(shift);
        const auto lanes = [](const uint8_t* p) {
          return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
        };
        for (int64_t i = 0; i < kPanelN; i += kLanes) {
          __m512i field = lanes(bytes + i);
          if (two) field = _mm512_or_si512(field, _mm512_slli_epi32(lanes(bytes + i + step), 8));
          store(to + i, to_float(_mm512_and_si512(_mm512_srl_epi32(field, count), splat(mask))));
        }
#else
        for (int64_t i = 0; i < kPanelN; ++i)
          to[i] = float((bytes[i] | (two ? bytes[i + step] << 8 : 0)) >> shift & mask);
#endif
      }
    } else {
      by_rows(g0, g1, zero_lanes_,
              [this](int64_t n, int64_t g, int64_t count, float* to) { load_zeros(w_, n, g, count, to); });
    }
    return {zero_lanes_ - g0 * kPanelN, DType::f32, kPanelN};
  }

  // Codes of scales whose rows have one factor each, times it, in scale_lanes_.
  LOWBIT_SHARED StoredLanes scaled_codes(int64_t g0, int64_t g1) {
    const StoredLanes codes{static_cast<const uint8_t*>(w_.scales) + n0_, DType::u8, w_.scales_group};
    const int64_t first = n0_ * w_.factors_row;
    float factors[kPanelN];
    to_float(w_.scale_factors, w_.factors_dtype, first, w_.factors_row ? kPanelN : 1, factors);
    for (int64_t i = 1; !w_.factors_row && i < kPanelN; ++i) factors[i] = factors[0];
    for (int64_t g = g0; g < g1; ++g) {
      codes.prefetch(g, kPanelN, kPanelN);  // of the next panel
      for (int64_t i = 0; i < kPanelN; i += kLanes)
        store(scale_lanes_ + (g - g0) * kPanelN + i, codes.at(g, i) * lowbit::load(factors + i));
    }
    return {scale_lanes_ - g0 * kPanelN, DType::f32, kPanelN};
  }

  // lanes [g1 - g0, kPanelN] of codes *= their factors
  LOWBIT_SHARED void times_factors(const void* factors, int64_t g0, int64_t g1, float* lanes) {
    if (!w_.factors_row) {
      float factor;
      to_float(factors, w_.factors_dtype, 0, 1, &factor);
      for (int64_t i = 0; i < (g1 - g0) * kPanelN; i += kLanes)
        store(lanes + i, lowbit::load(lanes + i) * splat(factor));
      return;
    }
    const int64_t first = g0 / w_.scale_block, last = (g1 - 1) / w_.scale_block;
    const StoredLanes held =
        lanes_of(factors, w_.factors_dtype, w_.factors_row, 1, first, last + 1, false, factor_lanes_);
    for (int64_t block = first, g = g0; block <= last; ++block)
      for (; g < min64(g1, (block + 1) * w_.scale_block); ++g)
        for (int64_t i = 0; i < kPanelN; i += kLanes) {
          float* to = lanes + (g - g0) * kPanelN + i;
          store(to, lowbit::load(to) * held.at<true>(block, i));
        }
  }

  // zero_lanes_, minima, become centers; shift_lanes_ what is left of them. All are finite, or of no row.
  LOWBIT_SHARED void split_minima(int64_t count) {
    const float top = float((1 << w_.bits) - 1), twice = 2 * top, round = 0x1.8p23f;
    const uint32_t low_bits = (1u << w_.bits) - 1;  // a scale without these: its products with codes are exact
    for (int64_t i = 0; i < count; ++i) {
      const float s = scale_lanes_[i], m = zero_lanes_[i], ratio = m / s;
      const float above = ratio > 0.0f ? ratio : 0.0f, inside = above < top ? above : top;  // also where s is 0
      const float center = (inside + round) - round, product = center * s, rest = m - product;
      const uint32_t same = -(uint32_t(rest + product == m) & uint32_t(m - rest == product) &
                              uint32_t(ratio <= twice) & uint32_t((bits_of(s) & low_bits) == 0));  // all bits, or none
      zero_lanes_[i] = float_of(bits_of(center) & same);
      shift_lanes_[i] = float_of((bits_of(rest) & same) | (bits_of(m) & ~same));
    }
  }

  const CpuWeight& w_;
  const Schedule& p_;
  float *scale_lanes_, *zero_lanes_, *shift_lanes_, *factor_lanes_, *middle_, *values_;
  int64_t n0_ = 0, n1_ = 0;
};

}  // namespace
}  // namespace packed
}  // namespace lowbit
