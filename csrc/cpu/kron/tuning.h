// Thresholds of the kernels of the family `kron`; those that families share: cpu/tuning.h.
#pragma once
#include "cpu/simd.h"
#include "cpu/tuning.h"

namespace lowbit {
namespace kron {
namespace {

// Which product runs how (ops.cpp)
constexpr int64_t kSharedElements = int64_t(8) << 20;  // rows of x go through memory in ranges of about this size
constexpr int64_t kDotColumns = 128;      // from here on a sum over lanes costs less than transposing
constexpr int64_t kDotColumnsBf16 = 512;  // of pairs: 1024 is 11 % faster at M = 256, 40 % slower at M = 1
constexpr int64_t kFewOuterRows = 8;      // and below so many rows of x transposing does not pay
constexpr int64_t kFewLanes = 16;

// Rows and columns at a time (kernel.cpp)
constexpr int64_t kSliceBytes = 2048;  // of one row: 4 rows of `right` and a register tile of x fit the L1 cache
constexpr int64_t kExpanded = kSliceBytes / int64_t(sizeof(float));  // values of a packed row expanded at a time
constexpr int64_t kRange = 64, kNarrowRange = 16;  // rows of `right` that a task takes, and where rows of x are few
constexpr int64_t kDotPassRows = 384, kOuterPassRows = 64;  // rows multiplied with a range at a time
constexpr int64_t kStreamRows = 24;    // rows of x up to which memory sets the pace
constexpr int64_t kLeftRows = 24;      // rows of `left` per pass: their results stay in L1
constexpr int64_t kTransposed = 16;    // rows and lanes that are transposed at a time
constexpr int64_t kAhead = 6144;       // bytes: how far ahead dense rows are fetched

// Register tiles
constexpr int kTileM = 6;
constexpr int kTileN = kHasAvx512 ? 4 : 2;      // vectors, where lanes run along rows: as many as registers hold
constexpr int kDotTileM = kTileM * kTileN / 4;  // with four rows of `right`

}  // namespace
}  // namespace kron
}  // namespace lowbit
