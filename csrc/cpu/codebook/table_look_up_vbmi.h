// Codes as bytes to values, one table at a time (table_look_up.h): AVX-512 with VBMI.
#pragma once
#include "cpu/arena.h"
#include "cpu/codebook/planes.h"
#include "cpu/codebook/register_tables.h"

namespace lowbit {
namespace codebook {
namespace {

struct Table {
  float* values;
  Int* planes;
  explicit Table(Arena& a) : values(a.take<float>(kMaxEntries)), planes(a.take<Int>(4 * kMaxEntries / 64)) {}
  void load(const Weight& w, int64_t index) const {
    load_table(w, index, values);
    if (w.bits > 5) split_planes(values, entries(w), planes);
  }
};

template <int kBits>
inline void look_up_planes(const uint8_t* codes, int64_t n, const Table& table, Float scale, float* out) {
  const Planes<kBits, 4> planes(table.planes);
  // Planes leaves the entry of code 16*l + 4*j + i in lane 4*l + i of vector j: so give it code 16*j + 4*l + i there.
  const Int order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  in_steps<64>(codes, n, out, [&](const uint8_t* from, float* to) {
    Int value[4];
    planes.look_up(_mm512_permutexvar_epi32(order, load_bytes(from)), value);
    LOWBIT_UNROLL for (int j = 0; j < 4; ++j)
      store(to + 16 * j, _mm512_mul_ps(_mm512_castsi512_ps(value[j]), scale));
  });
}

inline void look_up(const uint8_t* codes, int64_t n, int bits, const Table& table, float scale, float* out) {
  const Float s = splat(scale);
  switch (bits) {
    case 5: return look_up_registers<2>(codes, n, table.values, s, out);
    case 6: return look_up_planes<6>(codes, n, table, s, out);
    case 7: return look_up_planes<7>(codes, n, table, s, out);
    case 8: return look_up_planes<8>(codes, n, table, s, out);
    default: return look_up_registers<1>(codes, n, table.values, s, out);
  }
}

}  // namespace
}  // namespace codebook
}  // namespace lowbit
