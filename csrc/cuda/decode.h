// What the decode kernels of the families with packed codes share on the host: the shape of a block, splits of K.
#pragma once
#include <algorithm>
#include <cstdint>

#include "common/operands.h"
#include "cuda/codes.h"
#include "cuda/device.h"

namespace lowbit {
namespace cuda {
namespace decode {

constexpr int ROW_WARPS = 2, K_WARPS = 4, THREADS = 32 * ROW_WARPS * K_WARPS, ROWS = 16 * ROW_WARPS;
constexpr int SLICE = K_WARPS * TILE;  // columns that a block multiplies at a time
constexpr int64_t MOST_ROWS = 16, MOST_COLUMNS = int64_t(1) << 20, MOST_VALUES = int64_t(1) << 31, MOST_SPLITS = 16;

// The bytes of a row of x, of elements E, in shared memory. With 64 bytes between, rows g and g + 1 are in different
// banks.
template <class E = uint16_t>
constexpr int PITCH_OF = sizeof(E) * SLICE + 64;

// Slices of x in shared memory: while one is read, the others are on their way.
template <int M_TILES, class E = uint16_t>
constexpr int STAGES_OF = M_TILES == 1 && sizeof(E) == 2 ? 3 : 2;

// Of shared memory, for the slices of x and afterwards for the sums of all warps.
template <int M_TILES>
constexpr int ring_bytes(int rows_of_x) {
  const int x = STAGES_OF<M_TILES> * rows_of_x * PITCH_OF<>, sums = K_WARPS * ROWS * 8 * M_TILES * 4;
  return x > sums ? x : sums;
}

inline int row_blocks(int64_t N) { return static_cast<int>((N + ROWS - 1) / ROWS); }

inline bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

// Why no decode kernel takes a call.
template <class Weight>
const char* declines(const Linear<Weight>& call) {
  const Weight& w = call.weight;
  if (call.M < 0 || call.M > MOST_ROWS) return "decode takes up to 16 rows of x";
  if (call.int8) return "decode has no int8 activations";
  if (call.dtype != DType::f16 && call.dtype != DType::bf16) return "decode takes x in float16 or bfloat16";
  if (w.K < 1 || w.K > MOST_COLUMNS) return "decode takes 1 to 2^20 columns";
  if (w.N < 0 || w.N * w.G >= MOST_VALUES) return "decode takes fewer than 2^31 groups";
  if (w.blocks || w.row_bytes != (w.K + TILE - 1) / TILE * 32 * w.bits) return "decode reads codes in tiles";
  if (!aligned(w.packed)) return "decode reads codes that begin at a multiple of 16 bytes";
  return nullptr;
}

// Into how many splits K is cut: blocks for all processors, and two slices of K at least for each. M has no say.
inline int splits_of(const Codes& w, const Device& device) {
  const int64_t slices = (w.K + SLICE - 1) / SLICE;
  const int64_t wanted = device.processors / std::max(1, row_blocks(w.N));
  return static_cast<int>(std::max<int64_t>(1, std::min({wanted, slices / 2, MOST_SPLITS})));
}

// float32 [splits, M, N]
template <class Weight>
int64_t workspace_bytes(const Linear<Weight>& call, const Device& device) {
  const int splits = splits_of(call.weight, device);
  return splits > 1 ? splits * call.M * call.weight.N * 4 : 0;
}

// Whether groups end inside a chunk of 32 columns.
inline bool cuts_chunks(const Codes& w) { return w.group_size < w.K && w.group_size % CHUNK != 0; }

// What the high word of its product with 2 * chunk is the group of a chunk: 2^31 / (chunks of a group), rounded up.
inline uint32_t group_factor(const Codes& w) {
  if (w.group_size >= w.K || w.group_size % CHUNK != 0) return 0;
  const int64_t chunks = w.group_size / CHUNK;
  return static_cast<uint32_t>(((int64_t(1) << 31) + chunks - 1) / chunks);
}

}  // namespace decode
}  // namespace cuda
}  // namespace lowbit
