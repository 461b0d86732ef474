// Codes as bytes to values, one table at a time (table_look_up.h): AVX-512 without VBMI. It looks up words of 16 bits,
// 32 codes at a time.
#pragma once
#include "cpu/arena.h"
#include "cpu/codebook/register_tables.h"

namespace lowbit {
namespace codebook {
namespace {

// round(values * inverse) of 16 values, halves to even, in -32767..32767
inline __m256i to_fixed(Float values, Float inverse) {
  const Float v = _mm512_mul_ps(values, inverse);
  return _mm512_cvtepi32_epi16(
      _mm512_cvtps_epi32(_mm512_max_ps(_mm512_min_ps(v, splat(32767.0f)), splat(-32767.0f))));
}
inline __m256i to_fixed(const float* values, Float scale, Float inverse) {
  return to_fixed(_mm512_mul_ps(load(values), scale), inverse);
}

struct Table {
  float* values;
  explicit Table(Arena& a) : values(a.take<float>(kMaxEntries)) {}
  void load(const Weight& w, int64_t index) const { load_table(w, index, values); }
};

// The entries as words T (steps.h).
struct FixedTable {
  int16_t* words;
  explicit FixedTable(Arena& a) : words(a.take<int16_t>(kMaxEntries)) {}
  void load(const float* values, int64_t count, float scale, float inverse) const;
};

// A table of words in registers.
template <int kBits>
struct WordTable {
  static constexpr int kParts = kBits <= 5 ? 1 : 1 << (kBits - 5);
  Int part[kParts];
  Int operator()(Int index) const {
    constexpr int last = kParts - 1;
    if (kParts == 1) return _mm512_permutexvar_epi16(index, part[0]);
    const auto pair = [&](int i) {
      return _mm512_permutex2var_epi16(part[2 * i & last], index, part[(2 * i + 1) & last]);
    };
    if (kParts == 2) return pair(0);
    const __mmask32 bit6 = _mm512_test_epi16_mask(index, _mm512_set1_epi16(64));
    const Int low = _mm512_mask_blend_epi16(bit6, pair(0), pair(1));
    if (kParts == 4) return low;
    const Int high = _mm512_mask_blend_epi16(bit6, pair(2), pair(3));
    return _mm512_mask_blend_epi16(_mm512_test_epi16_mask(index, _mm512_set1_epi16(128)), low, high);
  }
};

inline void FixedTable::load(const float* values, int64_t count, float scale, float inverse) const {
  for (int64_t i = 0; i < max64(count, 32); i += 16) {
    const __m256i fixed = to_fixed(values + (count <= 16 ? 0 : i), splat(scale), splat(inverse));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(words + i), fixed);
  }
}

// The halves of values.
template <int kBits>
inline void look_up_halves(const uint8_t* codes, int64_t n, const Table& table, Float scale, float* out) {
  WordTable<kBits> low, high;
  alignas(64) static constexpr struct Even {
    int16_t index[32] = {};
    constexpr Even() {
      for (int i = 0; i < 32; ++i) index[i] = int16_t(2 * i);
    }
  } halves;
  const Int even = load_bytes(halves.index), odd = _mm512_add_epi16(even, _mm512_set1_epi16(1));
  LOWBIT_UNROLL for (int r = 0; r < WordTable<kBits>::kParts; ++r) {
    const Int a = load_bytes(table.values + 32 * r), b = load_bytes(table.values + 32 * r + 16);
    low.part[r] = _mm512_permutex2var_epi16(a, even, b);
    high.part[r] = _mm512_permutex2var_epi16(a, odd, b);
  }
  // Unpacking leaves codes 8*l + 4*j + i in lane 4*l + i of vector j: so give it code 16*j + 4*l + i there.
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  in_steps<32>(codes, n, out, [&](const uint8_t* from, float* to) {
    const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    const Int c = _mm512_cvtepu8_epi16(_mm256_permutevar8x32_epi32(bytes, order));
    const Int l = low(c), h = high(c);
    store(to, _mm512_mul_ps(_mm512_castsi512_ps(_mm512_unpacklo_epi16(l, h)), scale));
    store(to + 16, _mm512_mul_ps(_mm512_castsi512_ps(_mm512_unpackhi_epi16(l, h)), scale));
  });
}

inline void look_up(const uint8_t* codes, int64_t n, int bits, const Table& table, float scale, float* out) {
  const Float s = splat(scale);
  switch (bits) {
    case 5: return look_up_registers<2>(codes, n, table.values, s, out);
    case 6: return look_up_halves<6>(codes, n, table, s, out);
    case 7: return look_up_halves<7>(codes, n, table, s, out);
    case 8: return look_up_halves<8>(codes, n, table, s, out);
    default: return look_up_registers<1>(codes, n, table.values, s, out);
  }
}

template <int kBits>
inline void look_up_words(const uint8_t* codes, int64_t n, const FixedTable& table, int16_t* out) {
  WordTable<kBits> words;
  LOWBIT_UNROLL for (int r = 0; r < WordTable<kBits>::kParts; ++r) words.part[r] = load_bytes(table.words + 32 * r);
  in_steps<32>(codes, n, out, [&](const uint8_t* from, int16_t* to) {
    const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    _mm512_storeu_si512(to, words(_mm512_cvtepu8_epi16(bytes)));
  });
}

inline void look_up(const uint8_t* codes, int64_t n, int bits, const FixedTable& table, int16_t* out) {
  switch (bits) {
    case 6: return look_up_words<6>(codes, n, table, out);
    case 7: return look_up_words<7>(codes, n, table, out);
    case 8: return look_up_words<8>(codes, n, table, out);
    default: return look_up_words<5>(codes, n, table, out);
  }
}

}  // namespace
}  // namespace codebook
}  // namespace lowbit
