// What tests ask of the emulation, beside the table of library.h.
#include "cuda/primitives.h"

#define LOWBIT_EXPORT extern "C" __attribute__((visibility("default")))

// Before a call: from now on only the arrays that are allowed may be accessed; the order of warps (emulation.h).
LOWBIT_EXPORT void lowbit_emulation_begin(int order) {
  lowbit::cuda::emulation::ranges_known() = true;
  lowbit::cuda::emulation::ranges().clear();
  lowbit::cuda::emulation::order() = order;
}

LOWBIT_EXPORT void lowbit_emulation_allow(const char* array, size_t bytes) {
  lowbit::cuda::emulation::ranges().push_back({array, array + bytes});
}

// Arrays are not known to who calls the library as the package does: nothing is checked against them any more.
LOWBIT_EXPORT void lowbit_emulation_end() { lowbit::cuda::emulation::ranges_known() = false; }

// What GPU the library takes the CPU for.
LOWBIT_EXPORT void lowbit_emulation_device(int architecture, int processors, int shared_bytes) {
  lowbit::cuda::emulated_device() = {architecture, processors, shared_bytes};
}
