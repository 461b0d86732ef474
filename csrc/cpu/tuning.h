// Thresholds that the kernels of several families share. A family's own are in its tuning.h.
#pragma once
#include <cstddef>
#include <cstdint>

namespace lowbit {

// Threads (run.h)
constexpr int64_t kTaskElements = 32768;   // rows are converted in tasks of about this many elements
constexpr int64_t kTaskProducts = 131072;  // rows are multiplied in tasks of about this many products
constexpr int64_t kTaskChunks = 4096;      // chunks that a thread arranges at least
constexpr int64_t kExpansion = 4;          // expanding a weight costs about as much as this many products

// Memory
constexpr size_t kScratchKept = size_t(4) << 20;  // larger buffers live for one call only
constexpr size_t kHugePage = size_t(2) << 20;
constexpr int64_t kRowsAhead = 4;           // rows of a gather that are fetched ahead
constexpr int64_t kRowBytesAhead = 512;     // of each, at most
constexpr int64_t kChunksAtOnce = 16;       // of a row before the next row's: whole cache lines on both sides

// Products
constexpr int64_t kPassRows = 384;   // rows of x in one pass over the weights; a multiple of every register tile
constexpr int64_t kSlice = 512;      // columns expanded at a time: 4 rows of w and a tile of x fit the L1 cache
constexpr int64_t kPanelRows = 64;   // rows expanded together when M is large: they stay in the L2 cache
constexpr int64_t kRowTile = 4;      // rows of w that are multiplied together where lanes run along K

}  // namespace lowbit
