// Whether a row's result is the same in every batch (lowbit/invariance.py).
#pragma once
#include <atomic>

namespace lowbit {

inline std::atomic<bool> batch_invariant{true};

}  // namespace lowbit
