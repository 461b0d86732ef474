// Codes from the canonical bitstream: code j is the `bits` bits at bit j*bits, least significant first.
//
//   bits = 3   byte 0: 22111000   byte 1: 5444 3332   byte 2: 77766655     (digit = index of the code)
//
// Eight codes fill exactly `bits` bytes, so every multiple of eight codes starts on a byte.
#pragma once
#include "cpu/simd.h"

namespace lowbit {
namespace {

constexpr int64_t kUnpackSlack = 64;  // unpack() may write this many codes past `count`

// Scalar definition: out[j] = code j, for 8 codes.
inline void unpack8(const uint8_t* src, int bits, uint8_t* out) {
  uint64_t word = 0;
  for (int i = 0; i < bits; ++i) word |= uint64_t(src[i]) << 8 * i;
  for (int j = 0; j < 8; ++j) out[j] = uint8_t(word >> bits * j & ((1u << bits) - 1));
}

// unpack() fetches the bytes `ahead` of those it reads. A prefetch never faults, so they need not exist.
LOWBIT_INLINE void prefetch(const uint8_t* src, int64_t ahead) {
  __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(src) + uintptr_t(ahead)));
}

#if defined(__AVX512VBMI__)

struct UnpackTables {
  uint8_t spread[9][64] = {}, shifts[9][64] = {};
  constexpr UnpackTables() {
    for (int bits = 1; bits <= 8; ++bits)
      for (int i = 0; i < 64; ++i) {
        spread[bits][i] = uint8_t((i / 8 * bits + i % 8) & 63);
        shifts[bits][i] = uint8_t(i % 8 * bits);
      }
  }
};
constexpr UnpackTables kUnpack;

struct Codes64 {
  __m128i part[4];
  Int lanes(int v) const { return _mm512_cvtepu8_epi32(part[v]); }  // codes 16 * v .. 16 * v + 15
};

struct Unpack64 {
  __m512i spread, shifts, mask;
  __mmask8 whole;  // the words of 64 codes
  explicit Unpack64(int bits)
      : spread(_mm512_loadu_si512(kUnpack.spread[bits])),
        shifts(_mm512_loadu_si512(kUnpack.shifts[bits])),
        mask(_mm512_set1_epi8(char((1 << bits) - 1))),
        whole(__mmask8((1 << bits) - 1)) {}
  // word q of `spread` holds the `bits` bytes of codes 8q..8q+7; vpmultishiftqb takes 8 bits from bit i*bits of it
  __m512i operator()(__m512i bytes) const {
    return _mm512_and_si512(_mm512_multishift_epi64_epi8(shifts, _mm512_permutexvar_epi8(spread, bytes)), mask);
  }
  // The first `count` codes at src. Of up to 32 codes, only their own bytes are read.
  Codes64 read(const uint8_t* src, int64_t count) const {
    const Int codes = (*this)(count > 32 ? _mm512_maskz_loadu_epi64(whole, src)
                                         : _mm512_maskz_loadu_epi32(__mmask16(whole), src));
    return {{_mm512_castsi512_si128(codes), _mm512_extracti32x4_epi32(codes, 1), _mm512_extracti32x4_epi32(codes, 2),
             _mm512_extracti32x4_epi32(codes, 3)}};
  }
};

// out[j] = code j for j < round_up(count, 64); src holds round_up(count, 32) codes, and nothing behind them is read.
inline void unpack(const uint8_t* src, const uint8_t* /*end*/, int64_t ahead, int bits, int64_t count, uint8_t* out) {
  const Unpack64 codes(bits);
  int64_t j = 0;
  for (; j + 32 < count; j += 64, src += 8 * bits) {
    prefetch(src, ahead);
    _mm512_storeu_si512(out + j, codes(_mm512_maskz_loadu_epi64(codes.whole, src)));
  }
  if (j < count)  // at most 32 codes are left; the memory behind them may not exist
    _mm512_storeu_si512(out + j, codes(_mm512_maskz_loadu_epi32(__mmask16(codes.whole), src)));
}

#else
struct Unpack64;  // where kHasVnni
#if defined(__AVX2__)

struct UnpackTables {
  uint8_t window[9][16] = {};
  uint16_t align[9][8] = {};
  constexpr UnpackTables() {
    for (int bits = 1; bits <= 8; ++bits)
      for (int j = 0; j < 8; ++j) {
        window[bits][2 * j] = uint8_t(j * bits / 8);
        window[bits][2 * j + 1] = uint8_t(j * bits / 8 + 1);
        align[bits][j] = uint16_t(1u << (16 - bits - j * bits % 8));
      }
  }
};
constexpr UnpackTables kUnpack;

struct Unpack32 {
  __m256i window, align;
  __m128i right;
  explicit Unpack32(int bits)
      : window(twice(kUnpack.window[bits])), align(twice(kUnpack.align[bits])), right(_mm_cvtsi32_si128(16 - bits)) {}
  static __m256i twice(const void* p) {
    return _mm256_broadcastsi128_si256(_mm_loadu_si128(static_cast<const __m128i*>(p)));
  }
  // 16-bit window of each code -> multiply: the code becomes the top bits -> shift: it becomes the value
  __m256i codes(const uint8_t* low, const uint8_t* high) const {
    __m256i bytes = _mm256_inserti128_si256(
        _mm256_castsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(low))),
        _mm_loadu_si128(reinterpret_cast<const __m128i*>(high)), 1);
    return _mm256_srl_epi16(_mm256_mullo_epi16(_mm256_shuffle_epi8(bytes, window), align), right);
  }
  __m256i operator()(const uint8_t* src, int bits) const {
    return _mm256_packus_epi16(codes(src, src + 2 * bits), codes(src + bits, src + 3 * bits));
  }
};

// out[j] = code j for j < round_up(count, 32); src holds round_up(count, 32) codes; nothing at or past `end` is read.
inline void unpack(const uint8_t* src, const uint8_t* end, int64_t ahead, int bits, int64_t count, uint8_t* out) {
  if (bits == 8 || bits == 4) {
    for (int64_t j = 0; j < count; j += 32, src += 4 * bits) {
      prefetch(src, ahead);
      __m256i bytes;
      if (bits == 8) {
        bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(src));
      } else {
        const __m128i pairs = _mm_loadu_si128(reinterpret_cast<const __m128i*>(src)), mask = _mm_set1_epi8(15);
        const __m128i low = _mm_and_si128(pairs, mask), high = _mm_and_si128(_mm_srli_epi16(pairs, 4), mask);
        bytes = _mm256_setr_m128i(_mm_unpacklo_epi8(low, high), _mm_unpackhi_epi8(low, high));
      }
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + j), bytes);
    }
    return;
  }
  const Unpack32 codes(bits);
  const int64_t reach = 3 * bits + 16;  // bytes read for 32 codes
  for (int64_t j = 0; j < count; j += 32, src += 4 * bits) {
    prefetch(src, ahead);
    uint8_t copy[64];
    const uint8_t* from = src;
    if (end - src < reach) {
      std::memset(copy, 0, sizeof copy);
      std::memcpy(copy, src, size_t(4 * bits));
      from = copy;
    }
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + j), codes(from, bits));
  }
}

#else

inline void unpack(const uint8_t* src, const uint8_t* /*end*/, int64_t ahead, int bits, int64_t count, uint8_t* out) {
  for (int64_t j = 0; j < count; j += 8, src += bits) {
    if (j % 64 == 0) prefetch(src, ahead);
    unpack8(src, bits, out + j);
  }
}

#endif
#endif

}  // namespace
}  // namespace lowbit
