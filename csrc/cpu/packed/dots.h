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
// `from_codes` makes the same from a quad of unpacked codes. `zero` is that of the part's rows.
// kInGroups: each group of a row of x has a scale.
template <bool kNarrow, bool kInGroups = false>
struct Int8Dot {
  using Sum = Int;
  static constexpr int kSteps = 1;
  static constexpr bool kCodes = true;  // weights are codes, four to a word
  static constexpr bool kCentred = false, kMoved = false, kScaled = kInGroups;
  static float moved(int) { return 0; }
  static Sum start(float) { return zero_int(); }
  static Float lanes(Sum s) { return to_float(s); }
  static Sum add(Sum s, Int w, int32_t x) { return dot4<kNarrow>(s, w, splat(x)); }
  static Int from_codes(Int codes, int, int, Float) { return codes; }
  template <int kBits>
  static Int weights(const uint8_t* chunk, int64_t ld, int part, int q, int, Float) {
    return quad<kBits>(chunk, ld, part, q);
  }
};

struct FloatDot32 {
  using Sum = Float;
  static constexpr int kSteps = 4;
  static constexpr bool kCodes = false;
  static constexpr bool kCentred = true, kMoved = false, kScaled = false;  // weights are code - zero
  static float moved(int) { return 0; }
  static Sum start(float sum) { return splat(sum); }
  static Float lanes(Sum s) { return s; }
  static Sum add(Sum s, Int w, int32_t x) { return fma(as_float(w), as_float(splat(x)), s); }
  static Int from_codes(Int codes, int step, int, Float zero) {
    const Int code = step == 3 ? shifted(codes, 24) : bit_and(shifted(codes, 8 * step), splat(255));
    return as_int(to_float(code) - zero);
  }
  template <int kBits>
  static Int weights(const uint8_t* chunk, int64_t ld, int part, int q, int step, Float zero) {
    return from_codes(quad<kBits>(chunk, ld, part, q), step, kBits, zero);
  }
};

// Where kHasBf16. Below 8 bits a weight is 2^bits + code: the bits of the code behind a fixed exponent. At 8 bits it is
// the code.
struct Bf16Dot {
  using Sum = Float;
  static constexpr int kSteps = 2;
  static constexpr bool kCodes = false;
  static constexpr bool kCentred = false, kMoved = true, kScaled = false;
  static float moved(int bits) { return bits < 8 ? float(1 << bits) : 0.0f; }
  static Sum start(float sum) { return splat(sum); }
  static Float lanes(Sum s) { return s; }
  static Sum add(Sum s, Int w, int32_t x) {
    return dot_bf16(s, w, splat(x));
  }
  static Int from_codes(Int codes, int step, int bits, Float) {
    return bits < 8 ? behind_exponent(shifted(codes, bits - 7), step, bits) : rounded(codes, step);
  }
  template <int kBits>
  static Int weights(const uint8_t* chunk, int64_t ld, int part, int q, int step, Float) {
    return kBits < 8 ? behind_exponent(quad_at<kBits, (7 - kBits) & 7>(chunk, ld, part, q), step, kBits)
                     : rounded(quad<kBits>(chunk, ld, part, q), step);
  }

 private:
  // Of codes in bits 7 - bits and up of bytes
  static Int behind_exponent(Int codes, int step, int bits) {
    const uint32_t exponent = uint32_t(127 + bits) << 7, mantissa = 0x7fu >> (7 - bits) << (7 - bits);
    return or_masked(splat(int32_t(exponent * 0x00010001u)), shifted(codes, 8 * step),
                     splat(int32_t(mantissa * 0x00010001u)));
  }

  // Through fp32: the upper half of a code as fp32 is that code as bf16
  static Int rounded(Int codes, int step) {
    const Int lane = iota();
    const auto value = [&](int byte) {  // of each lane
      const Int from = lowbit::add(splat(int32_t(0x80808000u) + byte), multiply(bit_and(lane, splat(3)), splat(4)));
      return as_int(to_float(pick_bytes(codes, from)));
    };
    const Int upper_halves = lowbit::add(splat(0x00210001), multiply(lane, splat(0x00020002)));
    return pick_words(value(step), upper_halves, value(step + 2));
  }
};

}  // namespace
}  // namespace lowbit
