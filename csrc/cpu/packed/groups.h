// The scales and zeros of the rows of a panel, as register tiles read them.
#pragma once
#include "cpu/arena.h"
#include "cpu/packed/kernel.h"
#include "cpu/packed/schedule.h"

namespace lowbit {
namespace packed {
namespace {

class PanelGroups {
 public:
  PanelGroups(Arena& arena, const Weight& w, const Schedule& p)
      : w_(w),
        p_(p),
        scale_lanes_(arena.take<float>((p.slice + kGroupsAtOnce) * kPanelN)),
        zero_lanes_(arena.take<float>((p.slice + kGroupsAtOnce) * kPanelN)),
        middle_(arena.take<float>(kPanelN)),
        values_(arena.take<float>(kBlockRows * kGroupsAtOnce)) {
    if (arena.counting()) return;
    for (int64_t i = 0; i < kPanelN; ++i) middle_[i] = float(1 << (w.bits - 1));
  }

  StoredLanes scale{}, zero{};

  // Loads those of rows [n0, n1) for the groups of segments [s0, s1). in_place: a whole panel's that are stored group
  // after group are not copied.
  void load(int64_t n0, int64_t n1, int64_t s0, int64_t s1, bool in_place) {
    n0_ = n0;
    n1_ = n1;
    const int64_t g0 = p_.group(s0), g1 = p_.group(s1 - 1) + 1;
    scale = lanes_of(w_.scales, w_.scales_dtype, w_.scales_row, w_.scales_group, g0, g1, in_place, scale_lanes_);
    zero = w_.zeros ? lanes_of(w_.zeros, w_.zeros_dtype, w_.zeros_row, w_.zeros_group, g0, g1, in_place, zero_lanes_)
                    : StoredLanes{middle_, DType::f32, 0};
  }

 private:
  // In place, or copied to `lanes`: [g1 - g0, kPanelN].
  StoredLanes lanes_of(const void* values, DType dtype, int64_t row, int64_t group, int64_t g0, int64_t g1,
                       bool in_place, float* lanes) {
    const int64_t n0 = n0_, rows = n1_ - n0, size = element_size(dtype);
    const bool by_group = group > 1 || w_.G == 1;  // in memory
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
    for (int64_t g = g0; g < g1; g += kGroupsAtOnce) {
      const int64_t count = min64(kGroupsAtOnce, g1 - g);
      for (int64_t r = 0; r < rows; r += kBlockRows) {
        const int64_t some = min64(kBlockRows, rows - r);
        for (int64_t i = 0; i < some; ++i)
          to_floats(values, dtype, (n0 + r + i) * row + g * group, group, count, values_ + i * kGroupsAtOnce);
        transpose16(values_, some, lanes + (g - g0) * kPanelN + r, kPanelN);
      }
    }
    return {lanes - g0 * kPanelN, DType::f32, kPanelN};
  }

  const Weight& w_;
  const Schedule& p_;
  float *scale_lanes_, *zero_lanes_, *middle_, *values_;
  int64_t n0_ = 0, n1_ = 0;
};

}  // namespace
}  // namespace packed
}  // namespace lowbit
