// Thresholds of the kernels of the family `packed`; those that families share: cpu/tuning.h.
#pragma once
#include "cpu/simd.h"
#include "cpu/tuning.h"

namespace lowbit {
namespace {

// Register tiles: rows of x, and blocks of 16 rows of w. With AVX-512, 6 x 4 accumulators and their operands fit the
// 32 registers.
constexpr int kPanelTileRows = 6;                          // of an expanded panel
constexpr int kTileBlocks = kHasAvx512 ? 4 : 1;
constexpr int kWideTileRows = kHasAvx512 ? 4 : 1;          // straight from blocks, all of a panel at a time
constexpr int kTallTileRows = kHasAvx512 ? 16 : 1;         // straight from blocks, one block at a time
constexpr int kMostTallRows = kHasAvx512 ? 128 : 1;        // of x: for more, a panel costs less than repeated unpacking

// Segments: columns of K that are summed before a scale is applied.
constexpr int64_t kExactK = 65536;      // K * 127 * 255 < 2^31
constexpr int64_t kFloatSegment = 256;  // columns that share the exponent of their pieces
constexpr int64_t kIntSegment = 2048;
constexpr int64_t kGroupsAtOnce = 16;   // groups whose scales are read together

// Pieces: an element of y may be off by so many units of rounding of sum |x w|, whatever x (lowbit/testing/numerics.py).
inline float allowed_units(int64_t K) { return 8 + __builtin_sqrtf(float(max64(K, 4096))); }
// In segments whose doubt exceeds this share of what their sum is on average, elements larger than so many means are
// listed (none of Gaussian ones is), where they are at most one of so many columns.
constexpr float kListedDoubt = 0.5f;
constexpr float kListedMeans = 16;
constexpr int64_t kColumnsPerListed = 32;
// What the sum of a segment is on average, of its norm times the largest |code - zero|: 4/5 of what it is for Gaussian
// weights. A row that this leaves in doubt gets a fourth piece.
constexpr float surely(bool groups, bool integer_zeros) {
  return (integer_zeros ? 0.12f : 0.21f) * (groups ? 1 : 0.65f);  // integer zeros count as 0
}

// Rows of bfloat16 x that take less time in pieces than in bf16 products, where a row's result may depend on the batch.
constexpr int64_t few_rows_in_pieces(int bits) { return bits == 8 ? 3 : bits <= 4 ? 1 : 0; }

// How far ahead of a register tile's reads the blocks are fetched, in bytes. The hardware follows vectors that are read
// in the order of memory: at 8 bits, and at 4 bits with one row of x (there it helps to fetch a whole chunk in one go).
// It falls behind where the products take longer than the memory, or where planes alternate.
constexpr int64_t kFar = 10240, kFarther = 20480;

}  // namespace
}  // namespace lowbit
