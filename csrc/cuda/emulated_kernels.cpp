// The kernels of this folder for the CPU, as a library with the C entry points that the one for GPUs has, and two more.
#include "cuda/packed/decode.cu"

#define LOWBIT_EXPORT extern "C" __attribute__((visibility("default")))

// Before a call: no array may be accessed any more; the order of warps (emulation.h).
LOWBIT_EXPORT void lowbit_emulation_begin(int order) {
  lowbit::cuda::emulation::ranges().clear();
  lowbit::cuda::emulation::order() = order;
}

LOWBIT_EXPORT void lowbit_emulation_allow(const char* array, size_t bytes) {
  lowbit::cuda::emulation::ranges().push_back({array, array + bytes});
}
