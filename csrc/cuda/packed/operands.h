// What decode makes of codes in tiles and of groups, in few instructions (benchmarks/tools/cuda_static.py counts them).
#pragma once
#include "cuda/codes.h"

#ifdef LOWBIT_EMULATED
#define LOWBIT_ROLLED
#else
#define LOWBIT_ROLLED _Pragma("unroll 1")
#endif

namespace lowbit {
namespace cuda {

constexpr int CHUNKS = TILE / CHUNK;  // of a tile

// What float_at() reads, as it is stored: it can be loaded long before it is a number.
LOWBIT_DEVICE int size_of(int dtype) {
  return dtype == static_cast<int>(DType::f32) ? 4 : dtype == static_cast<int>(DType::u8) ? 1 : 2;
}

LOWBIT_DEVICE uint32_t float_bits(const char* at, bool wide) {
  if (wide) return load(reinterpret_cast<const uint32_t*>(at));
  return load(reinterpret_cast<const uint16_t*>(at));
}

LOWBIT_DEVICE float float_of(uint32_t bits, int dtype) {
  if (dtype == static_cast<int>(DType::f16)) return to_float<DType::f16>(static_cast<uint16_t>(bits));
  return float_of(dtype == static_cast<int>(DType::f32) ? bits : bits << 16);
}

LOWBIT_DEVICE uint32_t moved_down(uint32_t bits, int by) { return by >= 0 ? bits >> by : bits << -by; }

// The codes of a row of a tile less a center, chunk after chunk: Centered, with fewer shifts. float16 has room for 10
// bits: codes of up to 6 bits may stay where their widest field is in its byte, as numbers times 2^lift. One multiply-add
// takes the factor and the center away: exact, too.
template <int BITS, DType T>
struct Operand {
  using Shifted = Centered<BITS, T>;
  static constexpr int WIDTH = BITS == 8 ? 8 : BITS >= 4 ? 4 : 2, FIELDS = 16 / WIDTH;  // of the widest plane
  static constexpr bool IN_PLACE = T == DType::f16 && BITS > 1 && BITS <= 6;
  static constexpr int LIFTS = IN_PLACE ? 8 / WIDTH : 1;
  static constexpr uint32_t INTO = Shifted::SPLIT ? 0 : Shifted::BASE * 0x00010001u;

  struct Center {
    uint32_t lifted[LIFTS];
  };

  LOWBIT_DEVICE static uint32_t prepare(int value) { return Shifted::prepare(value); }

  // Of what prepare() made.
  LOWBIT_DEVICE static Center lifted(uint32_t prepared) {
    Center c;
    c.lifted[0] = prepared;
    LOWBIT_UNROLL
    for (int i = 1; i < LIFTS; ++i) {  // -(1024 * 2^-lift + value), by one multiply-add: (1024 + value) * 2^lift, and the rest
      const int lift = i * WIDTH;
      c.lifted[i] = prepared * (1u << lift) + (0x8000u + 0x6400u - 0x0400u * lift - (0x6400u << lift)) * 0x00010001u;
    }
    return c;
  }

  LOWBIT_DEVICE static Center center(int value) { return lifted(prepare(value)); }

  uint32_t bytes[4];  // of the widest plane, the byte that the fields are in
  uint32_t twos[4];   // of the plane of one bit, the octets of lanes 2i and 2i + 1, each in 16 bits

  // Comes before of() for every chunk of a tile, in their order.
  LOWBIT_DEVICE void next_chunk(const TileRow<BITS>& row, int chunk) {
    if (BITS % 2 && chunk == 0) {
      LOWBIT_UNROLL
      for (int i = 0; i < 4; ++i)
        twos[i] = opaque(select_bytes(i < 2 ? row.octets.x : row.octets.y, i % 2 ? 0x3322u : 0x1100u));
    }
    if constexpr (IN_PLACE) {
      LOWBIT_UNROLL
      for (int i = 0; i < 4; ++i) {
        if (chunk % FIELDS == 0) bytes[i] = word(row.parts[chunk / FIELDS], i);
        if (chunk % FIELDS == FIELDS / 2) bytes[i] = opaque(bytes[i] >> 8);
      }
    }
  }

  // Columns 32 * chunk + 8t + 2i and the next.
  LOWBIT_DEVICE uint32_t of(const TileRow<BITS>& row, int chunk, int i, const Center& center) const {
    const int lift = IN_PLACE ? chunk * WIDTH % 8 : 0;
    uint32_t codes = INTO;
    if constexpr (BITS > 1) {
      const uint32_t fields = IN_PLACE ? bytes[i] : word(row.parts[chunk / FIELDS], i) >> chunk % FIELDS * WIDTH;
      codes = masked_or(fields, ((1u << WIDTH) - 1) * 0x00010001u << lift, codes);
    }
    if constexpr (BITS == 6 || BITS == 7)
      codes = masked_or(moved_down(word(row.parts[2], i), 2 * chunk - 4 - lift), 0x00300030u << lift, codes);
    if constexpr (BITS % 2) {
      const int place = BITS - 1 + lift;
      codes = masked_or(moved_down(twos[i], chunk - place), 0x00010001u << place, codes);
    }
    if constexpr (Shifted::SPLIT) return Shifted::to_operand(codes, center.lifted[0]);
    if (lift == 0) return subtract_pair<T>(codes, center.lifted[0]);
    const uint32_t factor = (0x3C00u - 0x0400u * lift) * 0x00010001u;  // 2^-lift
    return multiply_add_pair<T>(codes, factor, center.lifted[lift / WIDTH % LIFTS]);
  }
};

}  // namespace cuda
}  // namespace lowbit
