// Launches of codebook/steps.cuh.
#pragma once
#include "common/codebook.h"
#include "cuda/int8.h"
#include "cuda/primitives.h"

namespace lowbit {
namespace cuda {
namespace codebook_int8 {

using Call = Linear<codebook::Weight>;

// Starts find_steps().
int launch_steps(const codebook::Weight& w, float* steps, Stream stream);

// Starts add_splits(), where there are splits: parts int32 [splits, 2, M, N].
int launch_sum(const Call& call, const float* inverse, const float* steps, const int32_t* parts, int splits,
               Stream stream);

}  // namespace codebook_int8
}  // namespace cuda
}  // namespace lowbit
