// Quotients by a number that the host knows: a product instead of a division, for column numbers and the like.
#pragma once
#include "cuda/primitives.h"

namespace lowbit {
namespace cuda {

// n / divisor for 0 <= n < 2^31. With divisor <= 2^shift, factor = 2^(31 + shift) / divisor rounded up, which exceeds
// the quotient by less than 2^shift / divisor * 2^-shift of itself: n is too small for that to reach the next integer.
struct Divisor {
  uint32_t factor;
  int shift;

  LOWBIT_DEVICE int quotient(int n) const {
    return static_cast<int>(multiply_high(2u * static_cast<uint32_t>(n), factor) >> shift);
  }
};

inline Divisor divisor_of(int64_t divisor) {
  int shift = 0;
  while ((int64_t(1) << shift) < divisor) ++shift;
  const uint64_t numerator = uint64_t(1) << (31 + shift);
  return {static_cast<uint32_t>((numerator + divisor - 1) / divisor), shift};
}

}  // namespace cuda
}  // namespace lowbit
