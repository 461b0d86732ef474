// Codes as bytes to values, one table at a time (table_look_up.h): AVX2. Up to 6 bits, it looks up the entries byte by
// byte, 32 codes at a time (`vpshufb` looks up 16 bytes). Above, it looks codes up one by one.
#pragma once
#include "cpu/arena.h"
#include "cpu/codebook/tables.h"

namespace lowbit {
namespace codebook {
namespace {

// round(values * inverse) of 16 values, halves to even, in -32767..32767
inline __m256i to_fixed(Float low, Float high, Float inverse) {
  const auto half = [&](Float values) {
    const Float v = _mm256_mul_ps(values, inverse);
    return _mm256_cvtps_epi32(_mm256_max_ps(_mm256_min_ps(v, splat(32767.0f)), splat(-32767.0f)));
  };
  // packing works within halves of a register
  return _mm256_permute4x64_epi64(_mm256_packs_epi32(half(low), half(high)), 0xd8);
}
inline __m256i to_fixed(const float* values, Float scale, Float inverse) {
  return to_fixed(_mm256_mul_ps(load(values), scale), _mm256_mul_ps(load(values + 8), scale), inverse);
}

struct Table {
  float* values;
  uint8_t* planes;  // [4, entries]: byte p of every entry; up to 6 bits
  explicit Table(Arena& a) : values(a.take<float>(kMaxEntries)), planes(a.take<uint8_t>(4 * 64)) {}
  void load(const Weight& w, int64_t index) const;
};

// The entries as words T (steps.h).
struct FixedTable {
  int16_t* words;
  uint8_t* planes;  // [2, entries]
  explicit FixedTable(Arena& a) : words(a.take<int16_t>(kMaxEntries)), planes(a.take<uint8_t>(2 * 64)) {}
  void load(const float* values, int64_t count, float scale, float inverse) const;
};

// planes[p * count + i] = byte p of values[i]; count: 16, 32 or 64
inline void split_planes(const float* values, int64_t count, uint8_t* planes) {
  const __m128i order = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  for (int64_t i = 0; i < count; i += 16) {
    const auto part = [&](int j) {
      return _mm_shuffle_epi8(_mm_loadu_si128(reinterpret_cast<const __m128i*>(values + i + 4 * j)), order);
    };
    const __m128i a = part(0), b = part(1), c = part(2), d = part(3);
    const __m128i ab[2] = {_mm_unpacklo_epi32(a, b), _mm_unpackhi_epi32(a, b)};
    const __m128i cd[2] = {_mm_unpacklo_epi32(c, d), _mm_unpackhi_epi32(c, d)};
    LOWBIT_UNROLL for (int p = 0; p < 4; ++p)
      _mm_store_si128(reinterpret_cast<__m128i*>(planes + p * count + i),
                      p % 2 ? _mm_unpackhi_epi64(ab[p / 2], cd[p / 2]) : _mm_unpacklo_epi64(ab[p / 2], cd[p / 2]));
  }
}

// The same for 16 words.
inline void split_planes(__m256i words, int64_t count, uint8_t* planes) {
  const __m128i a = _mm256_castsi256_si128(words), b = _mm256_extracti128_si256(words, 1), low = _mm_set1_epi16(255);
  _mm_store_si128(reinterpret_cast<__m128i*>(planes), _mm_packus_epi16(_mm_and_si128(a, low), _mm_and_si128(b, low)));
  _mm_store_si128(reinterpret_cast<__m128i*>(planes + count),
                  _mm_packus_epi16(_mm_srli_epi16(a, 8), _mm_srli_epi16(b, 8)));
}

// byte[p] = byte p of the entries of 32 codes, in tables of 16 * kParts
template <int kBytes, int kParts>
inline void look_up_bytes(Int codes, const uint8_t* planes, Int (&byte)[kBytes]) {
  // `vpshufb` gives 0 where the index is above 127: where the code is in another part
  Int index[kParts];
  LOWBIT_UNROLL for (int i = 0; i < kParts; ++i)
    index[i] = _mm256_adds_epu8(_mm256_xor_si256(codes, _mm256_set1_epi8(char(16 * i))), _mm256_set1_epi8(0x70));
  LOWBIT_UNROLL for (int p = 0; p < kBytes; ++p) {
    const auto part = [&](int i) {
      const __m128i* at = reinterpret_cast<const __m128i*>(planes + 16 * (p * kParts + i));
      return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_load_si128(at)), kParts == 1 ? codes : index[i]);
    };
    byte[p] = part(0);
    LOWBIT_UNROLL for (int i = 1; i < kParts; ++i) byte[p] = _mm256_or_si256(byte[p], part(i));
  }
}

inline Int load_codes(const uint8_t* from) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)); }

template <int kParts>
inline void look_up_planes(const uint8_t* codes, int64_t n, const Table& table, float scale, float* out) {
  const Float s = splat(scale);
  // Unpacking leaves code 16*l + 4*j + i in lane 4*l + i of vector j: so give it code 8*j + 4*l + i there.
  const Int order = _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7);
  in_steps<32>(codes, n, out, [&](const uint8_t* from, float* to) {
    Int byte[4];
    look_up_bytes<4, kParts>(_mm256_permutevar8x32_epi32(load_codes(from), order), table.planes, byte);
    const Int low[2] = {_mm256_unpacklo_epi8(byte[0], byte[1]), _mm256_unpackhi_epi8(byte[0], byte[1])};
    const Int high[2] = {_mm256_unpacklo_epi8(byte[2], byte[3]), _mm256_unpackhi_epi8(byte[2], byte[3])};
    LOWBIT_UNROLL for (int j = 0; j < 2; ++j) {
      store(to + 16 * j, _mm256_mul_ps(_mm256_castsi256_ps(_mm256_unpacklo_epi16(low[j], high[j])), s));
      store(to + 16 * j + 8, _mm256_mul_ps(_mm256_castsi256_ps(_mm256_unpackhi_epi16(low[j], high[j])), s));
    }
  });
}

template <int kParts>
inline void look_up_planes(const uint8_t* codes, int64_t n, const FixedTable& table, int16_t* out) {
  in_steps<32>(codes, n, out, [&](const uint8_t* from, int16_t* to) {
    Int byte[2];  // unpacking works within halves of a register
    look_up_bytes<2, kParts>(_mm256_permute4x64_epi64(load_codes(from), 0xd8), table.planes, byte);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_unpacklo_epi8(byte[0], byte[1]));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 16), _mm256_unpackhi_epi8(byte[0], byte[1]));
  });
}

inline void Table::load(const Weight& w, int64_t index) const {
  load_table(w, index, values);
  if (w.bits <= 6) split_planes(values, max64(entries(w), 16), planes);
}

inline void FixedTable::load(const float* values, int64_t count, float scale, float inverse) const {
  count = max64(count, 16);
  for (int64_t i = 0; i < count; i += 16) {
    const __m256i fixed = to_fixed(values + i, splat(scale), splat(inverse));
    if (count <= 64)
      split_planes(fixed, count, planes + i);
    else
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(words + i), fixed);
  }
}

inline void look_up(const uint8_t* codes, int64_t n, int bits, const Table& table, float scale, float* out) {
  switch (bits) {
    case 5: return look_up_planes<2>(codes, n, table, scale, out);
    case 6: return look_up_planes<4>(codes, n, table, scale, out);
    case 7:
    case 8: break;
    default: return look_up_planes<1>(codes, n, table, scale, out);
  }
  const float* values = table.values;
  in_steps<8>(codes, n, out, [&](const uint8_t* from, float* to) {
    uint64_t c;
    std::memcpy(&c, from, 8);
    const auto entry = [&](int j) { return values[uint8_t(c >> 8 * j)]; };
    const Float v = _mm256_setr_ps(entry(0), entry(1), entry(2), entry(3), entry(4), entry(5), entry(6), entry(7));
    store(to, _mm256_mul_ps(v, splat(scale)));
  });
}

inline void look_up(const uint8_t* codes, int64_t n, int bits, const FixedTable& table, int16_t* out) {
  switch (bits) {
    case 5: return look_up_planes<2>(codes, n, table, out);
    case 6: return look_up_planes<4>(codes, n, table, out);
    case 7:
    case 8: break;
    default: return look_up_planes<1>(codes, n, table, out);
  }
  const int16_t* words = table.words;
  in_steps<8>(codes, n, out, [&](const uint8_t* from, int16_t* to) {
    uint64_t c;
    std::memcpy(&c, from, 8);
    const auto entry = [&](int j) { return words[uint8_t(c >> 8 * j)]; };
    const __m128i v = _mm_setr_epi16(entry(0), entry(1), entry(2), entry(3), entry(4), entry(5), entry(6), entry(7));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), v);
  });
}

}  // namespace
}  // namespace codebook
}  // namespace lowbit
