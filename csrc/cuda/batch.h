// How the batch kernels of all families are laid out: cuda/batch.cuh.
#pragma once
#include <algorithm>

#include "common/operands.h"
#include "cuda/codes.h"
#include "cuda/device.h"

// Before a rare loop: where it is not unrolled, it takes no registers from the others.
#ifdef LOWBIT_EMULATED
#define LOWBIT_ROLLED
#else
#define LOWBIT_ROLLED _Pragma("unroll 1")
#endif

namespace lowbit {
namespace cuda {
namespace batch {

constexpr int WARPS = 8, THREADS = 32 * WARPS;
constexpr int ROW_TILES = 2, WARP_ROWS = 16 * ROW_TILES, ROWS = WARPS * WARP_ROWS;
constexpr int SLICE = 128;        // columns that are copied at a time
constexpr int PITCH = 2 * SLICE;       // bytes of a row of a slice of x
constexpr int SUMS_PITCH = ROWS + 4;   // floats of a row of sums: 8 rows of W by 4 pairs of rows of x are in 32 banks
constexpr int64_t MOST_ROWS = int64_t(1) << 24, MOST_COLUMNS = int64_t(1) << 20, MOST_VALUES = int64_t(1) << 31,
                  MOST_SPLITS = 16;
constexpr int64_t SPLIT_ROWS = 512;  // rows of x whose splits are in the workspace at a time

// Products of 8 rows of x that a block makes, at most; with 7 bits, so that the ring is in 99 KiB of shared memory.
template <int BITS>
constexpr int MOST_TILES = BITS == 7 ? 4 : 8;

// What is where in shared memory: RESERVED bytes for the family; the planes of 2 and 1 bits of two tiles, that which is
// read and the next; the stages of the ring, each a slice of x and of the planes of 8 and 4 bits. Of every 16 bytes of a
// plane (8 of one of 1 bit) that a thread reads there is a row for all THREADS.
template <int BITS, int M_TILES, int RESERVED>
struct Shared {
  static constexpr int COPIES = 2 * ROW_TILES;                    // rows of W of which a thread reads bytes
  static constexpr int WIDE = BITS == 8 ? 2 : BITS >= 4 ? 1 : 0;  // such bytes of a row in a slice
  static constexpr bool PAIRS = BITS == 2 || BITS == 3 || BITS == 6 || BITS == 7, OCTETS = BITS % 2;
  static constexpr int TILES = RESERVED, OCTETS_AT = PAIRS * COPIES * THREADS * 16;
  static constexpr int TILE_BYTES = OCTETS_AT + OCTETS * COPIES * THREADS * 8;
  static constexpr int STAGES = TILES + 2 * TILE_BYTES;
  static constexpr int X_BYTES = 8 * M_TILES * PITCH, STAGE_BYTES = X_BYTES + WIDE * COPIES * THREADS * 16;
  static constexpr int SUMS = 8 * M_TILES * SUMS_PITCH * 4;  // at the end, instead of all that

  // After the ring there may be more.
  static constexpr int bytes(int stages, int more = 0) {
    return std::max(STAGES + stages * STAGE_BYTES + more, SUMS);
  }
};

inline bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

template <class Weight>
const char* declines(const Linear<Weight>& call) {
  const Codes& w = call.weight;
  if (call.M < 0 || call.M >= MOST_ROWS) return "batch takes fewer than 2^24 rows of x";
  if (call.int8) return "batch has no int8 activations";
  if (call.dtype != DType::f16 && call.dtype != DType::bf16) return "batch takes x in float16 or bfloat16";
  if (w.K < 1 || w.K > MOST_COLUMNS) return "batch takes 1 to 2^20 columns";
  if (w.N < 0 || w.N >= MOST_ROWS || w.N * w.G >= MOST_VALUES) return "batch takes fewer than 2^31 groups";
  if (w.blocks || w.row_bytes != (w.K + TILE - 1) / TILE * 32 * w.bits) return "batch reads codes in tiles";
  if (!aligned(w.packed)) return "batch reads codes that begin at a multiple of 16 bytes";
  return nullptr;
}

// How a call is cut into blocks.
struct Plan {
  int m_tiles, stages, splits;
  bool cut;
  int64_t rows;  // of x, of one launch
};

// more: bytes of shared memory that a family takes besides the ring. stages is 0 where there is no room.
template <int BITS, int RESERVED, class Weight>
Plan plan_of(const Linear<Weight>& call, const Device& device, int more = 0) {
  const Codes& w = call.weight;
  Plan plan;
  plan.cut = w.group_size < w.K && w.group_size % CHUNK != 0;
  plan.m_tiles = plan.cut || call.M <= 32 ? 4 : MOST_TILES<BITS>;
  const auto room_for = [&](int stages) {
    const int bytes = plan.m_tiles == 8 ? Shared<BITS, 8, RESERVED>::bytes(stages, more)
                                        : Shared<BITS, 4, RESERVED>::bytes(stages, more);
    return bytes <= device.shared_bytes;
  };
  plan.stages = room_for(3) ? 3 : room_for(2) ? 2 : 0;
  // Blocks for all processors, and two tiles of K at least for each. M has no say where a row may not depend on it.
  const int64_t x_tiles = call.batch_invariant ? 1 : (call.M + 8 * plan.m_tiles - 1) / (8 * plan.m_tiles);
  const int64_t blocks = (w.N + ROWS - 1) / ROWS * x_tiles, tiles = (w.K + TILE - 1) / TILE;
  const int64_t wanted = device.processors / std::max<int64_t>(1, blocks);
  plan.splits = static_cast<int>(std::max<int64_t>(1, std::min({wanted, tiles / 2, MOST_SPLITS})));
  plan.rows = plan.splits > 1 ? std::min(call.M, SPLIT_ROWS) : call.M;
  return plan;
}

// float32 [splits, rows, N]
template <class Weight>
int64_t parts_bytes(const Linear<Weight>& call, const Plan& plan) {
  return plan.splits > 1 ? plan.splits * plan.rows * call.weight.N * 4 : 0;
}

}  // namespace batch
}  // namespace cuda
}  // namespace lowbit
