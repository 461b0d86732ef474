// Kinds of dot products whose lanes are output rows. A *step* multiplies 64 bytes per block (one word per row of w) by
// a broadcast word of 32 bits per row of x:
//   Int8Dot     four codes by four int8 activations        a quad of columns is one step
//   Bf16Dot     two bf16 weights by two bf16 activations   two steps: columns (0, 2) and (1, 3) of the quad
//   FloatDot32  an fp32 weight by an fp32 activation       four steps
#pragma once
#include "cpu/blocks_layout.h"

namespace lowbit {
namespace {

// Each kind has `weights`: a part of a block's 64 bytes for step i of quad q, from vectors `ld` bytes apart.
// `from_codes` makes the same from a quad of unpacked codes. Where kCentred, weights are code - center, so that a
// weight of 0 is 0; `Center` is that of each lane. kRest: `rest`, zero - center, times the sum of x is still to be
// subtracted at the end of a segment. kInGroups: each group of a row of x has a scale. `takes`: whether it is called for
// codes of so many bits; nothing is compiled for others.
template <bool kNarrow, bool kInGroups = false>
struct Int8Dot {
  using Sum = Int;
  static constexpr bool takes(int bits) { return kHasVnni || kNarrow == (bits < 8); }
  static constexpr int kSteps = 1;
  static constexpr bool kCodes = true;  // weights are codes, four to a word
  static constexpr bool kCentred = false, kRest = true, kScaled = kInGroups;
  using Center = Int;
  static Center center(Float, int) { return zero_int(); }
  static Float rest(Float zero, float) { return zero; }
  static Sum start() { return zero_int(); }
  static Float lanes(Sum s) { return to_float(s); }
  static Sum add(Sum s, Int w, int32_t x) { return dot4<kNarrow>(s, w, splat(x)); }
  static Int from_codes(Int codes, int, int, Center) { return codes; }
  template <int kBits>
  static Int weights(const uint8_t* chunk, int64_t ld, int part, int q, int, Center) {
    return quad<kBits>(chunk, ld, part, q);
  }
};

struct FloatDot32 {
  using Sum = Float;
  static constexpr bool takes(int) { return true; }
  static constexpr int kSteps = 4;
  static constexpr bool kCodes = false;
  static constexpr bool kCentred = true, kRest = false, kScaled = false;
  using Center = Float;
  static Center center(Float zero, int) { return zero; }
  static Float rest(Float, float) { return splat(0.0f); }
  static Sum start() { return splat(0.0f); }
  static Float lanes(Sum s) { return s; }
  static Sum add(Sum s, Int w, int32_t x) { return fma(as_float(w), as_float(splat(x)), s); }
  static Int from_codes(Int codes, int step, int, Center zero) {
    const Int code = step == 3 ? shifted(codes, 24) : bit_and(shifted(codes, 8 * step), splat(255));
    return as_int(to_float(code) - zero);
  }
  template <int kBits>
  static Int weights(const uint8_t* chunk, int64_t ld, int part, int q, int step, Center zero) {
    return from_codes(quad<kBits>(chunk, ld, part, q), step, kBits, zero);
  }
};

// bfloat16 of -31, ... 31
struct Bf16Table {
  alignas(64) uint16_t at[64];
  constexpr Bf16Table() : at() {
    for (int i = 1; i < 32; ++i) {
      int exponent = 0;
      while (i >> (exponent + 1)) ++exponent;
      at[31 + i] = uint16_t((127 + exponent) << 7 | ((i << (7 - exponent)) & 0x7f));
      at[31 - i] = uint16_t(at[31 + i] | 0x8000);
    }
  }
};
constexpr Bf16Table kBf16Table;

// Where kHasBf16. The center is the integer next to the zero, so that code - center is a bfloat16. It is looked up.
struct Bf16Dot {
  using Sum = Float;
  static constexpr bool takes(int) { return true; }
  static constexpr int kSteps = 2;
  static constexpr bool kCodes = false;
  static constexpr bool kCentred = true, kRest = true, kScaled = false;
  using Center = Int;  // up to 5 bits what leads from codes to indices of the table, in each byte; above, fp32
  static Center center(Float zero, int bits) {
    const Float center = nearest_integer(zero, float((1 << bits) - 1));
    if (bits > 5) return as_int(center + splat(0x1p23f));
    return multiply(subtract(splat(bits < 5 ? 15 : 31), to_int(center)), splat(0x01010101));
  }
  static Float rest(Float zero, float top) { return zero - nearest_integer(zero, top); }
  static Sum start() { return splat(0.0f); }
  static Float lanes(Sum s) { return s; }
  static Sum add(Sum s, Int w, int32_t x) { return dot_bf16(s, w, splat(x)); }

  static Int from_codes(Int codes, int step, int bits, Center center) {
    return bits <= 5 ? looked_up(codes, step, bits, center) : rounded(codes, step, as_float(center));
  }
  template <int kBits>
  static Int weights(const uint8_t* chunk, int64_t ld, int part, int q, int step, Center center) {
    return from_codes(quad<kBits>(chunk, ld, part, q), step, kBits, center);
  }

 private:
  static Int looked_up(Int codes, int step, int bits, Int to_index) {
    const Int index = shifted(lowbit::add(codes, to_index), 8 * step);
    if (bits < 5) return pick_words(load_bytes(kBf16Table.at + 16), index);
    return pick_words(load_bytes(kBf16Table.at), index, load_bytes(kBf16Table.at + 32));
  }

  // Through fp32, where 2^23 + code is the code behind a fixed exponent. The upper half of an integer up to 256 is its
  // bf16.
  static Int rounded(Int codes, int step, Float center) {
    const auto value = [&](int byte) {  // of each lane
      const Int code = or_masked(splat(0x4b000000), shifted(codes, 8 * byte), splat(255));
      return as_int(as_float(code) - center);
    };
    const Int upper_halves = lowbit::add(splat(0x00210001), multiply(iota(), splat(0x00020002)));
    return pick_words(value(step), upper_halves, value(step + 2));
  }
};

}  // namespace
}  // namespace lowbit
