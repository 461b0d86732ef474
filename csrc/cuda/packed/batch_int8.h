// Launches of packed/batch_int8.cuh.
#pragma once
#include <algorithm>
#include <numeric>

#include "common/packed.h"
#include "cuda/codes.h"
#include "cuda/device.h"
#include "cuda/int8.h"

namespace lowbit {
namespace cuda {
namespace packed_batch_int8 {

using Call = Linear<packed::Weight>;

constexpr int WARPS = 4, THREADS = 32 * WARPS;
constexpr int ROW_TILES = 2, WARP_ROWS = 16 * ROW_TILES, ROWS = WARPS * WARP_ROWS;
constexpr int COPIES = 2 * ROW_TILES;  // rows of W of which a thread reads bytes
constexpr int PITCH = TILE;            // bytes of a row of x
constexpr int SUMS_PITCH = ROWS + 4;   // words of a row of sums: 8 rows of W by 4 pairs of rows of x are in 32 banks
constexpr int64_t MOST_ROWS = int64_t(1) << 24, MOST_COLUMNS = int64_t(1) << 20, MOST_VALUES = int64_t(1) << 31,
                  MOST_SPLITS = 16;
constexpr int64_t ROWS_AT_ONCE = 4096, SPLIT_ROWS = 512;  // rows of x that are in the workspace at a time

// Stages of a ring, each a tile's columns of x and of W; at the end, instead of them, the sums.
inline int shared_bytes(int bits, int m_tiles, int stages) {
  const int stage = 8 * m_tiles * PITCH + ROWS * 32 * bits;
  return std::max(stages * stage, 8 * m_tiles * SUMS_PITCH * 4);
}

inline int64_t padded_rows(int64_t M) { return (M + 63) / 64 * 64; }

inline bool exact(const packed::Weight& w) { return w.G == 1 && (w.zeros == nullptr || w.zeros_dtype == DType::u8); }

inline const char* declines(const Call& call, const Device& device) {
  const packed::Weight& w = call.weight;
  if (const char* reason = int8::declines(call)) return reason;
  if (call.M < 0 || call.M >= MOST_ROWS) return "batch takes fewer than 2^24 rows of x";
  if (w.K < 1 || w.K > MOST_COLUMNS) return "batch takes 1 to 2^20 columns";
  if (w.N < 0 || w.N >= MOST_ROWS || w.N * w.G >= MOST_VALUES) return "batch takes fewer than 2^31 groups";
  if (w.blocks || w.row_bytes != (w.K + TILE - 1) / TILE * 32 * w.bits) return "batch reads codes in tiles";
  if (reinterpret_cast<uintptr_t>(w.packed) % 16 != 0) return "batch reads codes that begin at a multiple of 16 bytes";
  if (device.shared_bytes < 99 << 10) return "batch takes 99 KiB of shared memory";
  return nullptr;
}

// How a call is cut into blocks.
struct Plan {
  int m_tiles, stages, splits;
  int unit;  // tiles after which K may be split: no group is in two splits, unless its sum is exact
  bool cut;
  int64_t rows;  // of x, at a time
};

inline Plan plan_of(const Call& call, const Device& device) {
  const packed::Weight& w = call.weight;
  Plan plan;
  plan.cut = w.group_size < w.K && w.group_size % CHUNK != 0;
  const auto room_for = [&](int m_tiles, int stages) {
    return shared_bytes(w.bits, m_tiles, stages) <= device.shared_bytes;
  };
  plan.m_tiles = plan.cut || call.M <= 32 || !room_for(8, 2) ? 4 : 8;
  plan.stages = room_for(plan.m_tiles, 3) ? 3 : 2;
  const int64_t tiles = (w.K + TILE - 1) / TILE, group = std::min(w.group_size, w.K);
  plan.unit = static_cast<int>(exact(w) ? 1 : w.G == 1 ? tiles : group / std::gcd(group, int64_t(TILE)));
  // Blocks for all processors, and two tiles of K at least for each. M has no say where a row may not depend on it.
  const int64_t x_tiles = call.batch_invariant ? 1 : (call.M + 8 * plan.m_tiles - 1) / (8 * plan.m_tiles);
  const int64_t blocks = (w.N + ROWS - 1) / ROWS * x_tiles, units = (tiles + plan.unit - 1) / plan.unit;
  const int64_t wanted = device.processors / std::max<int64_t>(1, blocks);
  plan.splits = static_cast<int>(std::max<int64_t>(1, std::min({wanted, tiles / 2, units, MOST_SPLITS})));
  plan.rows = std::min(call.M, plan.splits > 1 ? SPLIT_ROWS : ROWS_AT_ONCE);
  return plan;
}

// int32 [G, padded rows]
inline int64_t x_sums_bytes(const Call& call, const Plan& plan) { return call.weight.G * padded_rows(plan.rows) * 4; }

// [splits, rows, N] of sums, and as many of outliers
inline int64_t parts_bytes(const Call& call, const Plan& plan) {
  return plan.splits > 1 ? plan.splits * plan.rows * call.weight.N * 4 : 0;
}

// x as int8, the sums of its groups, then the splits.
inline int64_t workspace_bytes(const Call& call, const Device& device) {
  const Plan plan = plan_of(call, device);
  return int8::quantized_bytes(plan.rows, call.weight.K) + x_sums_bytes(call, plan) +
         parts_bytes(call, plan) * (call.weight.outliers ? 2 : 1);
}

// Compiled for each width.
template <int BITS>
int launch(const Call& call, const Device& device, void* workspace, Stream stream);

}  // namespace packed_batch_int8
}  // namespace cuda
}  // namespace lowbit
