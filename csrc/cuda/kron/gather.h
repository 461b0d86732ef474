// Launches of kron/gather.cuh.
#pragma once
#include "common/kron.h"
#include "cuda/device.h"
#include "cuda/rows.h"
#include "cuda/primitives.h"

namespace lowbit {
namespace cuda {
namespace kron_gather {

using Call = Rows<kron::Weight>;

constexpr int THREADS = 256;

const char* declines(const Call& call, const Device& device);
int launch(const Call& call, const Device& device, Stream stream);

}  // namespace kron_gather
}  // namespace cuda
}  // namespace lowbit
