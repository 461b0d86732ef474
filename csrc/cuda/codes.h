// Codes in tiles (lowbit/backends/triton/tiles.py) as operands of mma.sync, for every kernel that reads tiles.
#pragma once
#include <type_traits>

#include "cuda/primitives.h"

namespace lowbit {
namespace cuda {

constexpr int TILE = 256, CHUNK = 32;  // columns

LOWBIT_DEVICE float float_at(const void* values, DType dtype, int64_t i) {
  if (dtype == DType::f32) return load(static_cast<const float*>(values) + i);
  if (dtype == DType::u8) return load(static_cast<const uint8_t*>(values) + i);
  const uint16_t bits = load(static_cast<const uint16_t*>(values) + i);
  return dtype == DType::f16 ? to_float<DType::f16>(bits) : to_float<DType::bf16>(bits);
}

template <DType T>
using Element = std::conditional_t<T == DType::f32, float, uint16_t>;

template <DType T>
LOWBIT_DEVICE float value_of(Element<T> element) {
  if constexpr (T == DType::f32) return element;
  else return to_float<T>(element);
}

template <DType T>
LOWBIT_DEVICE Element<T> rounded_to(float value) {
  if constexpr (T == DType::f32) return value;
  else return from_float<T>(value);
}

// What a tensor core multiplies where x is of type T. float32 is the exact sum of three bfloat16.
template <DType T>
constexpr DType OPERAND_OF = T == DType::f32 ? DType::bf16 : T;
template <DType T>
constexpr int PIECES_OF = T == DType::f32 ? 3 : 1;

// Two float32 as PIECES_OF pairs of bfloat16, the largest first. Each takes 8 bits of what is left. What is not finite
// is in the first alone.
LOWBIT_DEVICE void split_pair(uint32_t first, uint32_t second, uint32_t (&pieces)[3]) {
  uint32_t tops[2][3];
  LOWBIT_UNROLL
  for (int i = 0; i < 2; ++i) {
    const uint32_t bits = i ? second : first;
    const bool finite = (bits & 0x7F800000u) != 0x7F800000u;
    const uint32_t quiet = !finite && (bits & 0x007FFFFFu) ? 0x00400000u : 0u;  // a NaN stays one
    tops[i][0] = (bits | quiet) & 0xFFFF0000u;
    const float rest = finite ? float_of(bits) - float_of(tops[i][0]) : 0.0f;
    tops[i][1] = bits_of(rest) & 0xFFFF0000u;
    tops[i][2] = bits_of(rest - float_of(tops[i][1]));
  }
  LOWBIT_UNROLL
  for (int piece = 0; piece < 3; ++piece) pieces[piece] = tops[0][piece] >> 16 | (tops[1][piece] & 0xFFFF0000u);
}

LOWBIT_DEVICE uint32_t word(const Words4& v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }

// What one thread holds of one row of a tile: lanes 8t .. 8t+7 of all planes. The planes of 8, 4 and 2 bits have
// BITS / 2 parts of 32 x 16 bits; then, for odd BITS, comes a plane of 32 x 8 bits.
template <int BITS>
struct TileRow {
  Words4 parts[BITS / 2 + (BITS == 1)];
  Words2 octets;

  LOWBIT_DEVICE void fetch(const uint8_t* row, int t) {
    LOWBIT_UNROLL
    for (int p = 0; p < BITS / 2; ++p) parts[p] = load_once(reinterpret_cast<const Words4*>(row + 64 * p + 16 * t));
    if constexpr (BITS % 2) octets = load_once(reinterpret_cast<const Words2*>(row + 64 * (BITS / 2) + 8 * t));
  }

  // The codes of columns 32 * chunk + 8t + 2i and the next, as a pair of integers.
  LOWBIT_DEVICE uint32_t codes(int chunk, int i) const {
    uint32_t pair = 0;
    if constexpr (BITS > 1) {
      constexpr int WIDTH = BITS == 8 ? 8 : BITS >= 4 ? 4 : 2, FIELDS = 16 / WIDTH;
      constexpr uint32_t MASK = ((1u << WIDTH) - 1) * 0x00010001u;
      pair = word(parts[chunk / FIELDS], i) >> chunk % FIELDS * WIDTH & MASK;
    }
    if constexpr (BITS == 6 || BITS == 7) pair |= (word(parts[2], i) >> 2 * chunk & 0x00030003u) << 4;
    if constexpr (BITS % 2) {
      const uint32_t two = (i < 2 ? octets.x : octets.y) >> 16 * (i % 2) & 0xFFFFu;
      pair |= ((two | two << 8) >> chunk & 0x00010001u) << (BITS - 1);
    }
    return pair;
  }
};

// TileRow::codes() where the chunk is not known to the compiler: words of the widest plane (the part that
// holds the chunk) and of the plane of 2 bits above a plane of 4, and the octets of the plane of 1 bit.
template <int BITS>
LOWBIT_DEVICE uint32_t pair_of_codes(uint32_t widest, uint32_t above, const Words2& octets, int chunk, int i) {
  uint32_t pair = 0;
  if constexpr (BITS > 1) {
    constexpr int WIDTH = BITS == 8 ? 8 : BITS >= 4 ? 4 : 2, FIELDS = 16 / WIDTH;
    pair = widest >> chunk % FIELDS * WIDTH & ((1u << WIDTH) - 1) * 0x00010001u;
  }
  if constexpr (BITS == 6 || BITS == 7) pair |= (above >> 2 * chunk & 0x00030003u) << 4;
  if constexpr (BITS % 2) {
    const uint32_t two = (i < 2 ? octets.x : octets.y) >> 16 * (i % 2) & 0xFFFFu;
    pair |= ((two | two << 8) >> chunk & 0x00010001u) << (BITS - 1);
  }
  return pair;
}

// Integers 0 .. 2^BITS - 1 as numbers of 16 bits, less a center: both exact. An integer in the low bits of 1024
// (float16) or 128 (bfloat16, which has room for 7 bits) is added to it.
template <int BITS, DType T>
struct Centered {
  static constexpr bool SPLIT = T == DType::bf16 && BITS == 8;
  static constexpr uint32_t BASE = T == DType::f16 ? 0x6400u : 0x4300u;

  // What to_operand() takes for a center in 0 .. 2^BITS - 1.
  LOWBIT_DEVICE static uint32_t prepare(int center) {
    return (SPLIT ? from_float<T>(static_cast<float>(center)) : BASE + center) * 0x00010001u;
  }

  LOWBIT_DEVICE static uint32_t to_operand(uint32_t codes, uint32_t center) {
    constexpr uint32_t BASES = BASE * 0x00010001u;
    if constexpr (!SPLIT) return subtract_pair<T>(codes | BASES, center);
    // 128 + the low 7 bits, and 128 or 256 for the top bit; 256 less the former is exact, and so is what remains
    const uint32_t low = (codes & 0x007F007Fu) | BASES, top = (codes & 0x00800080u) | BASES;
    return subtract_pair<T>(subtract_pair<T>(top, center), subtract_pair<T>(0x43804380u, low));
  }
};

}  // namespace cuda
}  // namespace lowbit
