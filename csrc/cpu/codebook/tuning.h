// Thresholds of the kernels of the family `codebook`; those that families share: cpu/tuning.h.
#pragma once
#include "cpu/tuning.h"

namespace lowbit {
namespace codebook {
namespace {

// Products of words (linear_words.h)
constexpr int64_t kWordRows = 32;       // rows of w per pass over x
constexpr int64_t kWordPassRows = 132;  // rows of x per pass over w: a slice of them stays in L2. A multiple of kTileM
constexpr int64_t kFewRows = 16;        // rows of x up to which register tiles look up, and passes follow the rows of w
constexpr int64_t kFewPlaneRows = 4;    // the same where tables are held in planes or scales are applied after
constexpr int kLookUpTileM = 4;         // rows of x in a register tile that looks up

// Columns of a panel: with them, four rows of words and a register tile of x fit the L1 cache
constexpr int64_t kFloatWordSlice = 2048, kHalfWordSlice = 4096;

}  // namespace
}  // namespace codebook
}  // namespace lowbit
