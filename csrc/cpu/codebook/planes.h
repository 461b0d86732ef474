// Tables of 64, 128 or 256 entries, on AVX-512 with VBMI: looked up byte by byte, 64 codes at a time.
// Plane p of a table is byte p of every entry.
#pragma once
#include "cpu/simd.h"

namespace lowbit {
namespace codebook {
namespace {

inline Int byte_offsets(int p, int bytes) {  // p, p + bytes, p + 2 * bytes, ...; an index counts modulo 128
  alignas(64) static constexpr struct Iota {
    uint8_t value[64] = {};
    constexpr Iota() {
      for (int i = 0; i < 64; ++i) value[i] = uint8_t(i);
    }
  } iota;
  const Int i = _mm512_load_si512(iota.value);
  const Int twice = _mm512_add_epi8(i, i);
  return _mm512_add_epi8(bytes == 2 ? twice : _mm512_add_epi8(twice, twice), _mm512_set1_epi8(char(p)));
}

// planes[p * count / 64 + i / 64] byte i % 64 = byte p of values[i]; count: 64, 128 or 256
inline void split_planes(const float* values, int64_t count, Int* planes) {
  LOWBIT_UNROLL for (int p = 0; p < 4; ++p) {
    const Int offsets = byte_offsets(p, 4);
    for (int64_t i = 0; i < count; i += 64) {
      const auto half = [&](const float* v) {
        const Int a = _mm512_castps_si512(load(v)), b = _mm512_castps_si512(load(v + 16));
        return _mm512_castsi512_si256(_mm512_permutex2var_epi8(a, offsets, b));
      };
      planes[(p * count + i) / 64] =
          _mm512_inserti64x4(_mm512_castsi256_si512(half(values + i)), half(values + i + 32), 1);
    }
  }
}

// The same for words of 16 bits; words: count / 32 vectors.
inline void split_planes(const Int* words, int64_t count, Int* planes) {
  LOWBIT_UNROLL for (int p = 0; p < 2; ++p) {
    const Int offsets = byte_offsets(p, 2);
    for (int64_t i = 0; i < count / 32; i += 2)
      planes[p * count / 64 + i / 2] = _mm512_permutex2var_epi8(words[i], offsets, words[i + 1]);
  }
}

// A table in registers.
template <int kBits, int kBytes>
struct Planes {
  static constexpr int kParts = 1 << (kBits - 6);
  static constexpr int kRegisters = kBytes * kParts;
  Int part[kBytes][kParts];

  Planes() = default;
  LOWBIT_INLINE explicit Planes(const Int* planes) {
    LOWBIT_UNROLL for (int p = 0; p < kBytes; ++p) LOWBIT_UNROLL for (int i = 0; i < kParts; ++i)
      part[p][i] = in_register(planes[p * kParts + i]);
  }

  // byte[p] = byte p of the entries of 64 codes, whose bits above kBits may be anything
  LOWBIT_INLINE void bytes(Int codes, Int (&byte)[kBytes]) const {
    constexpr int last = kParts - 1;
    LOWBIT_UNROLL for (int p = 0; p < kBytes; ++p) {
      if (kBits == 6) {
        byte[p] = _mm512_permutexvar_epi8(codes, part[p][0]);
      } else {
        byte[p] = _mm512_permutex2var_epi8(part[p][0], codes, part[p][1 & last]);
        if (kBits == 8)
          byte[p] = _mm512_mask_blend_epi8(_mm512_movepi8_mask(codes), byte[p],
                                           _mm512_permutex2var_epi8(part[p][2 & last], codes, part[p][3 & last]));
      }
    }
  }

  // 2 bytes each: lane 8 * L + i of word[j] is the entry of code 16 * L + 8 * j + i
  LOWBIT_INLINE void look_up(Int codes, Int (&word)[2]) const {
    Int byte[kBytes];
    bytes(codes, byte);
    word[0] = _mm512_unpacklo_epi8(byte[0], byte[1]);
    word[1] = _mm512_unpackhi_epi8(byte[0], byte[1]);
  }

  // 4 bytes each: lane 4 * L + i of value[j] is the entry of code 16 * L + 4 * j + i
  LOWBIT_INLINE void look_up(Int codes, Int (&value)[4]) const {
    Int byte[kBytes];
    bytes(codes, byte);
    const Int low[2] = {_mm512_unpacklo_epi8(byte[0], byte[1]), _mm512_unpackhi_epi8(byte[0], byte[1])};
    const Int high[2] = {_mm512_unpacklo_epi8(byte[2 % kBytes], byte[3 % kBytes]),
                         _mm512_unpackhi_epi8(byte[2 % kBytes], byte[3 % kBytes])};
    LOWBIT_UNROLL for (int j = 0; j < 2; ++j) {
      value[2 * j] = _mm512_unpacklo_epi16(low[j], high[j]);
      value[2 * j + 1] = _mm512_unpackhi_epi16(low[j], high[j]);
    }
  }
};

}  // namespace
}  // namespace codebook
}  // namespace lowbit
