// Tables of up to 32 floats in one or two registers of AVX-512. `Table` has their values in memory.
#pragma once
#include "cpu/codebook/tables.h"

namespace lowbit {
namespace codebook {
namespace {

template <int kRegisters>
inline void look_up_registers(const uint8_t* codes, int64_t n, const float* table, Float scale, float* out) {
  const Float low = _mm512_mul_ps(load(table), scale);
  const Float high = kRegisters == 1 ? low : _mm512_mul_ps(load(table + 16), scale);
  in_steps<16>(codes, n, out, [&](const uint8_t* from, float* to) {
    const Int c = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
    store(to, kRegisters == 1 ? _mm512_permutexvar_ps(c, low) : _mm512_permutex2var_ps(low, c, high));
  });
}

}  // namespace
}  // namespace codebook
}  // namespace lowbit
