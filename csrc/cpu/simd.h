// The vectors of one instruction set, chosen by the compiler's flags, and the conversions written on them.
//
// Differences between instruction sets belong here. Kernels test the flags kHas... with `if constexpr`. A function that
// an instruction set lacks is declared for it all the same, and traps.
//
// Everything has internal linkage: the same names are compiled with different flags in different files, and the linker
// must never pick one file's copy for another. For the same reason no function template of std:: is used here.
#pragma once
#include <cstdint>
#include <cstring>
#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "common/dtype.h"

namespace lowbit {
namespace {

#if defined(__AVX2__)
constexpr bool kHasAvx2 = true;
#else
constexpr bool kHasAvx2 = false;
#endif
#if defined(__AVX512F__)  // with BW, DQ and VL
constexpr bool kHasAvx512 = true;
#else
constexpr bool kHasAvx512 = false;
#endif
#if defined(__AVX512VNNI__)  // and VBMI
constexpr bool kHasVnni = true;
#else
constexpr bool kHasVnni = false;
#endif
#if defined(__AVX512BF16__)
constexpr bool kHasBf16 = true;
#else
constexpr bool kHasBf16 = false;
#endif

#if defined(__AVX2__)
#define LOWBIT_UNROLL _Pragma("GCC unroll 16")
#else  // unrolled, tiles would not fit the registers
#define LOWBIT_UNROLL _Pragma("GCC unroll 1")
#endif
// For parts of a register tile: a call would force the tile's registers into memory.
#define LOWBIT_INLINE inline __attribute__((always_inline))
// For a whole register tile: inlines all that it calls. Otherwise GCC 12 inlines by the size of the file, and a change
// elsewhere moves accumulators from registers to memory. Not on AVX-512 without VNNI: there it spills the int8 tiles of
// 7 bits, which then take 1.06 times as long with 12 and 16 rows of x (Zen 4). Not where AddressSanitizer instruments
// every load: there it takes too long to compile.
#if (defined(__AVX512F__) && !defined(__AVX512VNNI__)) || defined(__SANITIZE_ADDRESS__)
#define LOWBIT_TILE
#else
#define LOWBIT_TILE __attribute__((flatten))
#endif
// For what runs once per row or less: inlined, it would be copied into every kernel.
#define LOWBIT_SHARED __attribute__((noinline))

inline int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

inline uint32_t bits_of(float f) {
  uint32_t u;
  std::memcpy(&u, &f, 4);
  return u;
}
inline float float_of(uint32_t u) {
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}

// ---------------------------------------------------------------------------------------------------------
// fp32 lanes (Float) and int32 lanes (Int).
//   dot16(acc, x, w): lane l gains x[2*l] * w[2*l] + x[2*l + 1] * w[2*l + 1] of int16 values, exactly
//   sum4_add(a, b, c, d, out): out[0..3] += the sum of each vector's lanes, always by the same tree
//   sum_add(a, out): the same for one vector; for Ints, out holds the bits of int32
//   in_register(v): v; the compiler must hold it in a register from here on
//   loaded_in_order(v): the same, and such vectors are loaded in the order of the source: the hardware fetches ahead

#if defined(__AVX512F__)

using Float = __m512;
using Int = __m512i;
constexpr int kLanes = 16;
inline Float load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, Float v) { _mm512_storeu_ps(p, v); }
inline Float splat(float v) { return _mm512_set1_ps(v); }
inline Float fma(Float a, Float b, Float c) { return _mm512_fmadd_ps(a, b, c); }
inline Int load(const int32_t* p) { return _mm512_loadu_si512(p); }
inline void store(int32_t* p, Int v) { _mm512_storeu_si512(p, v); }
inline Int zero_int() { return _mm512_setzero_si512(); }
inline Int splat(int32_t v) { return _mm512_set1_epi32(v); }
inline Int multiply(Int a, Int b) { return _mm512_mullo_epi32(a, b); }
inline Float to_float(Int v) { return _mm512_cvtepi32_ps(v); }
inline __m128 sum4(Float a, Float b, Float c, Float d) {
  Float ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  Float cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  __m512d p = _mm512_castps_pd(ab), q = _mm512_castps_pd(cd);
  Float s = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(p, q)), _mm512_castpd_ps(_mm512_unpackhi_pd(p, q)));
  __m256 h = _mm256_add_ps(_mm512_castps512_ps256(s), _mm512_extractf32x8_ps(s, 1));
  return _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
}

#elif defined(__AVX2__)

using Float = __m256;
using Int = __m256i;
constexpr int kLanes = 8;
inline Float load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, Float v) { _mm256_storeu_ps(p, v); }
inline Float splat(float v) { return _mm256_set1_ps(v); }
inline Float fma(Float a, Float b, Float c) { return _mm256_fmadd_ps(a, b, c); }
inline Int load(const int32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
inline void store(int32_t* p, Int v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v); }
inline Int zero_int() { return _mm256_setzero_si256(); }
inline Int splat(int32_t v) { return _mm256_set1_epi32(v); }
inline Int multiply(Int a, Int b) { return _mm256_mullo_epi32(a, b); }
inline Float to_float(Int v) { return _mm256_cvtepi32_ps(v); }
inline __m128 sum4(Float a, Float b, Float c, Float d) {
  Float ab = _mm256_add_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
  Float cd = _mm256_add_ps(_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d));
  __m256d p = _mm256_castps_pd(ab), q = _mm256_castps_pd(cd);
  Float s = _mm256_add_ps(_mm256_castpd_ps(_mm256_unpacklo_pd(p, q)), _mm256_castpd_ps(_mm256_unpackhi_pd(p, q)));
  return _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
}

#else  // portable vectors of four: SSE2, NEON or plain registers, as the compiler sees fit

typedef float Float __attribute__((vector_size(16)));
typedef int32_t Int __attribute__((vector_size(16)));
constexpr int kLanes = 4;
inline Float load(const float* p) {
  Float v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline void store(float* p, Float v) { std::memcpy(p, &v, sizeof v); }
inline Float splat(float v) { return Float{v, v, v, v}; }
inline Float fma(Float a, Float b, Float c) { return a * b + c; }  // two roundings: there may be no fused unit
inline Int load(const int32_t* p) {
  Int v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline void store(int32_t* p, Int v) { std::memcpy(p, &v, sizeof v); }
inline Int zero_int() { return Int{0, 0, 0, 0}; }
inline Int splat(int32_t v) { return Int{v, v, v, v}; }
typedef uint32_t Bits __attribute__((vector_size(16)));
inline Int multiply(Int a, Int b) { return Int(Bits(a) * Bits(b)); }
inline Float to_float(Int v) { return __builtin_convertvector(v, Float); }
inline void sum4_add(Float a, Float b, Float c, Float d, float* out) {
  const Float v[4] = {a, b, c, d};
  for (int i = 0; i < 4; ++i) out[i] += (v[i][0] + v[i][2]) + (v[i][1] + v[i][3]);
}
inline void sum_add(Float a, float* out) { *out += (a[0] + a[2]) + (a[1] + a[3]); }

#endif

#if defined(__AVX2__)
inline void sum4_add(Float a, Float b, Float c, Float d, float* out) {
  _mm_storeu_ps(out, _mm_add_ps(_mm_loadu_ps(out), sum4(a, b, c, d)));
}
inline void sum_add(Float a, float* out) { *out += _mm_cvtss_f32(sum4(a, a, a, a)); }
#endif

#if defined(__AVX2__)
inline __m128i sum128(Int v) {  // the sum of the vector's 128-bit parts
#if defined(__AVX512F__)
  const __m256i h = _mm256_add_epi32(_mm512_castsi512_si256(v), _mm512_extracti64x4_epi64(v, 1));
#else
  const __m256i h = v;
#endif
  return _mm_add_epi32(_mm256_castsi256_si128(h), _mm256_extracti128_si256(h, 1));
}
inline void sum4_add(Int a, Int b, Int c, Int d, float* out) {
  const __m128i p = _mm_hadd_epi32(sum128(a), sum128(b)), q = _mm_hadd_epi32(sum128(c), sum128(d));
  __m128i* to = reinterpret_cast<__m128i*>(out);
  _mm_storeu_si128(to, _mm_add_epi32(_mm_loadu_si128(to), _mm_hadd_epi32(p, q)));
}
#else
inline void sum4_add(Int a, Int b, Int c, Int d, float* out) {
  const Int v[4] = {a, b, c, d};
  for (int i = 0; i < 4; ++i)
    out[i] = float_of(bits_of(out[i]) + uint32_t(v[i][0] + v[i][1] + v[i][2] + v[i][3]));
}
#endif
inline void sum_add(Int a, float* out) {
  float sums[4] = {*out, 0, 0, 0};
  sum4_add(a, zero_int(), zero_int(), zero_int(), sums);
  *out = sums[0];
}

// Assembly, because GCC 12 copies every accumulator twice around the intrinsics of VNNI and then runs out of registers.
#if defined(__AVX512VNNI__)
inline Int dot16(Int acc, Int x, Int w) {
  asm("vpdpwssd %2, %1, %0" : "+v"(acc) : "v"(w), "v"(x));
  return acc;
}
#elif defined(__AVX512F__)
inline Int dot16(Int acc, Int x, Int w) { return _mm512_add_epi32(acc, _mm512_madd_epi16(x, w)); }
#elif defined(__AVX2__)
inline Int dot16(Int acc, Int x, Int w) { return _mm256_add_epi32(acc, _mm256_madd_epi16(x, w)); }
#else
inline Int dot16(Int acc, Int x, Int w) {
#if defined(__SSE2__)
  return acc + Int(_mm_madd_epi16(__m128i(x), __m128i(w)));
#else
  return acc + (x << 16 >> 16) * (w << 16 >> 16) + (x >> 16) * (w >> 16);  // low halves, high halves
#endif
}
#endif

// GCC 12 would load a vector again for each of its uses.
#if defined(__AVX512F__)
inline Int in_register(Int v) {
  asm("" : "+v"(v));
  return v;
}
inline Int loaded_in_order(Int v) {
  asm volatile("" : "+v"(v));
  return v;
}
#else
inline Int in_register(Int v) { return v; }
inline Int loaded_in_order(Int v) { return v; }
#endif
inline Int load_bytes(const void* p) { return load(static_cast<const int32_t*>(p)); }
inline void store_bytes(void* p, Int v) { store(static_cast<int32_t*>(p), v); }

// as_float(v), as_int(v): the same bits
// or_masked(a, b, mask) = a | (b & mask); select_bits(mask, a, b) = (a & mask) | (b & ~mask)
// negated_fma(a, b, c) = c - a * b, rounded as fma() is
// dot4<kNarrow>(acc, w, x): lane l gains sum_{j < 4} w[4*l + j] * x[4*l + j] of unsigned bytes w and signed
//   bytes x >= -127 (VNNI: >= -128), exactly; kNarrow: all w are below 128
inline Float as_float(Int v) { return Float(v); }
inline Int as_int(Float v) { return Int(v); }
inline Int as_int(Int v) { return v; }
inline Int bit_and(Int a, Int b) { return a & b; }
inline Float negated_fma(Float a, Float b, Float c) { return fma(-a, b, c); }
#if defined(__AVX512F__)
inline Int add(Int a, Int b) { return _mm512_add_epi32(a, b); }
inline Int subtract(Int a, Int b) { return _mm512_sub_epi32(a, b); }
inline Int to_int(Float v) { return _mm512_cvttps_epi32(v); }
inline Int or_masked(Int a, Int b, Int mask) { return _mm512_ternarylogic_epi32(b, a, mask, 0xec); }  // overwrites b
inline Int select_bits(Int mask, Int a, Int b) { return _mm512_ternarylogic_epi32(b, a, mask, 0xd8); }
#elif defined(__AVX2__)
inline Int add(Int a, Int b) { return _mm256_add_epi32(a, b); }
inline Int subtract(Int a, Int b) { return _mm256_sub_epi32(a, b); }
inline Int to_int(Float v) { return _mm256_cvttps_epi32(v); }
inline Int or_masked(Int a, Int b, Int mask) { return a | (b & mask); }
inline Int select_bits(Int mask, Int a, Int b) { return (a & mask) | (b & ~mask); }
#else
inline Int add(Int a, Int b) { return Int(Bits(a) + Bits(b)); }  // unsigned: may wrap around
inline Int subtract(Int a, Int b) { return Int(Bits(a) - Bits(b)); }
inline Int to_int(Float v) { return __builtin_convertvector(v, Int); }
inline Int or_masked(Int a, Int b, Int mask) { return a | (b & mask); }
inline Int select_bits(Int mask, Int a, Int b) { return (a & mask) | (b & ~mask); }
#endif

// q[i] = round(v[i] * inverse), halves to even, in -most..most, for whole vectors of v[0:n]; returns how many. There
// may be none: the scalar loop behind goes on from there.
template <class Element>
inline int64_t round_vectors(const float* v, int64_t n, float inverse, float most, Element* q) {
  int64_t i = 0;
#if defined(__AVX512F__)
  for (; i + 16 <= n; i += 16) {
    const Float scaled = _mm512_min_ps(_mm512_mul_ps(load(v + i), splat(inverse)), splat(most));
    const Int rounded = _mm512_cvtps_epi32(_mm512_max_ps(scaled, splat(-most)));
    if constexpr (sizeof(Element) == 1)
      _mm_storeu_si128(reinterpret_cast<__m128i*>(q + i), _mm512_cvtepi32_epi8(rounded));
    else
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(q + i), _mm512_cvtepi32_epi16(rounded));
  }
#elif defined(__AVX2__)
  if constexpr (sizeof(Element) == 2)
    for (; i + 16 <= n; i += 16) {
      const auto half = [&](const float* values) {
        const Float scaled = _mm256_min_ps(_mm256_mul_ps(load(values), splat(inverse)), splat(most));
        return _mm256_cvtps_epi32(_mm256_max_ps(scaled, splat(-most)));
      };
      // packing works within halves of a register
      const Int words = _mm256_permute4x64_epi64(_mm256_packs_epi32(half(v + i), half(v + i + 8)), 0xd8);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(q + i), words);
    }
#endif
  (void)v, (void)n, (void)inverse, (void)most, (void)q;
  return i;
}

#if defined(__AVX512VNNI__)
template <bool kNarrow>
inline Int dot4(Int acc, Int w, Int x) {
  asm("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(w), "v"(x));
  return acc;
}
#elif defined(__AVX512F__)
template <bool kNarrow>
inline Int dot4(Int acc, Int w, Int x) {
  if (kNarrow) return dot16(acc, _mm512_maddubs_epi16(w, x), _mm512_set1_epi16(1));
  acc = dot16(acc, _mm512_srai_epi16(_mm512_slli_epi16(x, 8), 8), _mm512_and_si512(w, splat(0x00ff00ff)));
  return dot16(acc, _mm512_srai_epi16(x, 8), _mm512_srli_epi16(w, 8));
}
#elif defined(__AVX2__)
template <bool kNarrow>
inline Int dot4(Int acc, Int w, Int x) {
  if (kNarrow) return dot16(acc, _mm256_maddubs_epi16(w, x), _mm256_set1_epi16(1));
  acc = dot16(acc, _mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8), _mm256_and_si256(w, splat(0x00ff00ff)));
  return dot16(acc, _mm256_srai_epi16(x, 8), _mm256_srli_epi16(w, 8));
}
#else
template <bool kNarrow>
inline Int dot4(Int acc, Int w, Int x) {
  for (int j = 0; j < 4; ++j) acc += (w >> (8 * j) & 255) * (x << (24 - 8 * j) >> 24);
  return acc;
}
#endif

// ---------------------------------------------------------------------------------------------------------
// What only some instruction sets have. Kernels test the flag at the right first; elsewhere these functions trap.
//   load_codes(p): kLanes bytes, one in each lane; entry(table, index): lane l = table[index[l]]; iota(): 0, 1, 2, ...
//   store_some(p, v, n): the first n lanes; may be all                                                      kHasAvx2
//   pick_words(a, index, b): word l = that at index[l] of a and b side by side; of a alone; pick_bytes(v, index): byte
//   l = that at index[l] of the same 128 bits                                                             kHasAvx512
//   nearest_integer(v, top): v rounded to an integer in 0 .. top; magnitude(v), larger(a, b)               kHasAvx512
//   dot_bf16(acc, w, x): lane l gains w[2*l] * x[2*l] and w[2*l + 1] * x[2*l + 1] of bfloat16 values, rounding after
//   each. Subnormal numbers count as zero, here and in
//   round_bf16(low, high): both as bfloat16; store_bf16(p, v, n): the first n lanes as such                 kHasBf16

[[noreturn]] inline void absent() { __builtin_trap(); }

#if defined(__AVX512F__)
inline Int load_codes(const uint8_t* p) {
  return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline Float entry(Float table, Int index) { return _mm512_permutexvar_ps(index, table); }
inline Int iota() { return _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15); }
inline void store_some(float* p, Float v, int64_t n) {
  if (n >= 16)
    store(p, v);
  else
    _mm512_mask_storeu_ps(p, __mmask16((1u << n) - 1), v);
}
inline Int pick_words(Int a, Int index, Int b) { return _mm512_permutex2var_epi16(a, index, b); }
inline Int pick_words(Int a, Int index) { return _mm512_permutexvar_epi16(index, a); }
inline Int pick_bytes(Int v, Int index) { return _mm512_shuffle_epi8(v, index); }
inline Float magnitude(Float v) { return _mm512_abs_ps(v); }
inline Float larger(Float a, Float b) { return _mm512_max_ps(a, b); }
inline Float nearest_integer(Float v, float top) {
  const Float inside = _mm512_max_ps(_mm512_min_ps(v, splat(top)), splat(0.0f));
  return _mm512_cvtepi32_ps(_mm512_cvtps_epi32(inside));
}
#else
#if defined(__AVX2__)
inline Int load_codes(const uint8_t* p) {
  return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
}
inline Float entry(Float table, Int index) { return _mm256_permutevar8x32_ps(table, index); }
inline Int iota() { return _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7); }
#else
inline Int load_codes(const uint8_t*) { absent(); }
inline Float entry(Float, Int) { absent(); }
inline Int iota() { absent(); }
#endif
inline void store_some(float*, Float, int64_t) { absent(); }
inline Int pick_words(Int, Int, Int) { absent(); }
inline Int pick_words(Int, Int) { absent(); }
inline Int pick_bytes(Int, Int) { absent(); }
inline Float magnitude(Float) { absent(); }
inline Float larger(Float, Float) { absent(); }
inline Float nearest_integer(Float, float) { absent(); }
#endif

#if defined(__AVX512BF16__)
// Assembly: see dot16().
inline Float dot_bf16(Float acc, Int w, Int x) {
  asm("vdpbf16ps %2, %1, %0" : "+v"(acc) : "v"(w), "v"(x));
  return acc;
}
inline Int round_bf16(Float low, Float high) { return Int(_mm512_cvtne2ps_pbh(high, low)); }
inline void store_bf16(void* p, Float v, int64_t n) {
  const __mmask16 some = __mmask16(0xffff >> (kLanes - min64(kLanes, n)));
  _mm256_mask_storeu_epi16(p, some, __m256i(_mm512_cvtneps_pbh(v)));
}
#else
inline Float dot_bf16(Float, Int, Int) { absent(); }
inline Int round_bf16(Float, Float) { absent(); }
inline void store_bf16(void*, Float, int64_t) { absent(); }
#endif

// out[j * ld + i] = in[i * 16 + j] for i < rows, j < 16, and anything for rows <= i < 16.
inline void transpose16(const float* in, int64_t rows, float* out, int64_t ld) {
#if defined(__AVX512F__)
  (void)rows;
  __m512 a[16], b[16];
  LOWBIT_UNROLL for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_ps(in + 16 * i);
  LOWBIT_UNROLL for (int i = 0; i < 16; i += 2) {  // pairs of rows
    b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
  }
  LOWBIT_UNROLL for (int i = 0; i < 16; i += 4) LOWBIT_UNROLL for (int h = 0; h < 2; ++h) {  // quads
    const __m512d x = _mm512_castps_pd(b[i + h]), y = _mm512_castps_pd(b[i + 2 + h]);
    a[i + 2 * h] = _mm512_castpd_ps(_mm512_unpacklo_pd(x, y));
    a[i + 2 * h + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(x, y));
  }
  LOWBIT_UNROLL for (int j = 0; j < 4; ++j) {  // a[4 * q + j]: rows 4q.., columns j, j + 4, j + 8, j + 12
    const __m512 lo01 = _mm512_shuffle_f32x4(a[j], a[4 + j], 0x44), hi01 = _mm512_shuffle_f32x4(a[j], a[4 + j], 0xee);
    const __m512 lo23 = _mm512_shuffle_f32x4(a[8 + j], a[12 + j], 0x44),
                 hi23 = _mm512_shuffle_f32x4(a[8 + j], a[12 + j], 0xee);
    _mm512_storeu_ps(out + j * ld, _mm512_shuffle_f32x4(lo01, lo23, 0x88));
    _mm512_storeu_ps(out + (j + 4) * ld, _mm512_shuffle_f32x4(lo01, lo23, 0xdd));
    _mm512_storeu_ps(out + (j + 8) * ld, _mm512_shuffle_f32x4(hi01, hi23, 0x88));
    _mm512_storeu_ps(out + (j + 12) * ld, _mm512_shuffle_f32x4(hi01, hi23, 0xdd));
  }
#else
  for (int64_t j = 0; j < 16; ++j)
    for (int64_t i = 0; i < rows; ++i) out[j * ld + i] = in[i * 16 + j];
#endif
}

// to[s * ld + i] = words[i * steps + s] for i < 4, 2 or 1 rows; returns how many rows. steps is a multiple of 4.
inline int64_t interleave(const int32_t* words, int64_t steps, int64_t rows, int32_t* to, int64_t ld) {
#if defined(__SSE2__)
  const auto row = [&](int64_t i, int64_t s) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(words + i * steps + s));
  };
  for (int64_t s = 0; rows >= 4 && s < steps; s += 4) {
    const __m128i a = row(0, s), b = row(1, s), c = row(2, s), d = row(3, s);
    const __m128i ab = _mm_unpacklo_epi32(a, b), cd = _mm_unpacklo_epi32(c, d);
    const __m128i ab_high = _mm_unpackhi_epi32(a, b), cd_high = _mm_unpackhi_epi32(c, d);
    __m128i* out[4];
    for (int64_t i = 0; i < 4; ++i) out[i] = reinterpret_cast<__m128i*>(to + (s + i) * ld);
    _mm_storeu_si128(out[0], _mm_unpacklo_epi64(ab, cd));
    _mm_storeu_si128(out[1], _mm_unpackhi_epi64(ab, cd));
    _mm_storeu_si128(out[2], _mm_unpacklo_epi64(ab_high, cd_high));
    _mm_storeu_si128(out[3], _mm_unpackhi_epi64(ab_high, cd_high));
  }
  if (rows >= 4) return 4;
  for (int64_t s = 0; rows >= 2 && s < steps; s += 4) {
    const __m128i low = _mm_unpacklo_epi32(row(0, s), row(1, s)), high = _mm_unpackhi_epi32(row(0, s), row(1, s));
    const auto out = [&](int64_t i) { return reinterpret_cast<__m128i*>(to + (s + i) * ld); };
    _mm_storel_epi64(out(0), low);
    _mm_storel_epi64(out(1), _mm_unpackhi_epi64(low, low));
    _mm_storel_epi64(out(2), high);
    _mm_storel_epi64(out(3), _mm_unpackhi_epi64(high, high));
  }
  if (rows >= 2) return 2;
#endif
  (void)rows;
  for (int64_t s = 0; s < steps; ++s) to[s * ld] = words[s];
  return 1;
}

// ---------------------------------------------------------------------------------------------------------
// 16-bit floats. Rounding is to nearest even; NaN stays NaN.

inline float half_to_float(uint16_t h) {
#if defined(__F16C__)
  return _cvtsh_ss(h);
#else
  const uint32_t sign = uint32_t(h & 0x8000) << 16, exponent = h >> 10 & 31, fraction = h & 0x3ff;
  if (exponent == 31) return float_of(sign | 0x7f800000 | fraction << 13);
  if (exponent) return float_of(sign | (exponent + 112) << 23 | fraction << 13);
  return float_of(sign | bits_of(float(fraction) * 0x1p-24f));
#endif
}

inline uint16_t float_to_half(float f) {
#if defined(__F16C__)
  return _cvtss_sh(f, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  const uint32_t u = bits_of(f), sign = u >> 16 & 0x8000, x = u & 0x7fffffff;
  if (x > 0x7f800000) return uint16_t(sign | 0x7e00);
  if (x >= 0x477ff000) return uint16_t(sign | 0x7c00);  // 65520 and above round to infinity
  // Below 2^-14 the result is subnormal: adding 0.5 rounds to a multiple of 2^-24, the half's unit.
  if (x < 0x38800000) return uint16_t(sign | (bits_of(float_of(x) + 0.5f) - 0x3f000000));
  return uint16_t(sign | ((x + 0xfff + (x >> 13 & 1) - 0x38000000) >> 13));
#endif
}

inline float bfloat16_to_float(uint16_t b) { return float_of(uint32_t(b) << 16); }

inline uint16_t float_to_bfloat16(float f) {
  const uint32_t u = bits_of(f), rounded = (u + 0x7fff + (u >> 16 & 1)) >> 16;
  return uint16_t((u & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}

// kLanes 16-bit floats
#if defined(__AVX512F__)
inline Float load_half(const void* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(static_cast<const __m256i*>(p)));
}
inline Float load_bfloat16(const void* p) {
  const __m256i v = _mm256_loadu_si256(static_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16));
}
#elif defined(__AVX2__)
inline Float load_half(const void* p) { return _mm256_cvtph_ps(_mm_loadu_si128(static_cast<const __m128i*>(p))); }
inline Float load_bfloat16(const void* p) {
  const __m128i v = _mm_loadu_si128(static_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(v), 16));
}
#else
template <class Convert>
inline Float load_converted(const void* p, Convert convert) {
  float v[kLanes];
  for (int i = 0; i < kLanes; ++i) v[i] = convert(static_cast<const uint16_t*>(p)[i]);
  return load(v);
}
inline Float load_half(const void* p) { return load_converted(p, half_to_float); }
inline Float load_bfloat16(const void* p) { return load_converted(p, bfloat16_to_float); }
#endif

// dst[i] = float(src[begin + i]), i < n
inline void to_float(const void* src, DType dtype, int64_t begin, int64_t n, float* dst) {
  int64_t i = 0;
  switch (dtype) {
    case DType::f32:
      std::memcpy(dst, static_cast<const float*>(src) + begin, size_t(n) * sizeof(float));
      break;
    case DType::f16: {
      const uint16_t* s = static_cast<const uint16_t*>(src) + begin;
#if defined(__F16C__)
      for (; i + 8 <= n; i += 8)
        _mm256_storeu_ps(dst + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(s + i))));
      for (; i < n; ++i) dst[i] = _cvtsh_ss(s[i]);
#endif
      for (; i < n; ++i) dst[i] = half_to_float(s[i]);
      break;
    }
    case DType::bf16: {
      const uint16_t* s = static_cast<const uint16_t*>(src) + begin;
      for (; i < n; ++i) dst[i] = bfloat16_to_float(s[i]);
      break;
    }
    case DType::u8: {
      const uint8_t* s = static_cast<const uint8_t*>(src) + begin;
      for (; i < n; ++i) dst[i] = float(s[i]);
      break;
    }
    case DType::none:
      break;
  }
}

// dst[i] = float(src[begin + i * step]), i < n
inline void to_floats(const void* src, DType dtype, int64_t begin, int64_t step, int64_t n, float* dst) {
  if (step == 1) return to_float(src, dtype, begin, n, dst);
  for (int64_t i = 0; i < n; ++i) to_float(src, dtype, begin + i * step, 1, dst + i);
}

// A value per lane and group, in memory as it is stored: value [group * step + row] in the lane of that row.
struct StoredLanes {
  const void* values;
  DType dtype;
  int64_t step;  // elements from one group to the next

  // Fetches the values of `rows` rows. The hardware does not follow them: they are too few in a row.
  LOWBIT_INLINE void prefetch(int64_t group, int64_t row, int64_t rows) const {
    const int64_t size = element_size(dtype);
    const uint8_t* first = static_cast<const uint8_t*>(values) + (group * step + row) * size;
    for (int64_t i = 0; i < rows * size; i += 64) __builtin_prefetch(first + i);
  }

  // Those of kLanes rows. AVX-512 converts f16 and u8 itself; the others go through memory.
  template <bool kFloats = false>  // whether they are known to be fp32
  LOWBIT_INLINE Float at(int64_t group, int64_t row) const {
    const int64_t i = group * step + row;
    if (kFloats || dtype == DType::f32) return load(static_cast<const float*>(values) + i);
#if defined(__AVX512F__)
    const uint16_t* wide = static_cast<const uint16_t*>(values) + i;
    if (dtype == DType::f16) return load_half(wide);
    if (dtype == DType::u8)
      return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(
          _mm_loadu_si128(reinterpret_cast<const __m128i*>(static_cast<const uint8_t*>(values) + i))));
#endif
    float v[kLanes];
    to_float(values, dtype, i, kLanes, v);
    return load(v);
  }
};

// Lane i = float(src[begin + i * step]), i < n <= 16; where kHasAvx512
#if defined(__AVX512F__)
inline Float some_floats(const void* src, DType dtype, int64_t begin, int64_t step, int64_t n) {
  if (step != 1 || dtype == DType::bf16) {
    float values[kLanes] = {};
    to_floats(src, dtype, begin, step, n, values);
    return load(values);
  }
  const __mmask16 some = __mmask16((1u << n) - 1);
  if (dtype == DType::f32) return _mm512_maskz_loadu_ps(some, static_cast<const float*>(src) + begin);
  if (dtype == DType::f16)
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(some, static_cast<const uint16_t*>(src) + begin));
  return _mm512_cvtepi32_ps(
      _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(some, static_cast<const uint8_t*>(src) + begin)));
}
#else
inline Float some_floats(const void*, DType, int64_t, int64_t, int64_t) { absent(); }
#endif

// dst[begin + i] = round(src[i]), i < n
inline void from_float(const float* src, DType dtype, int64_t begin, int64_t n, void* dst) {
  int64_t i = 0;
  switch (dtype) {
    case DType::f32:
      std::memcpy(static_cast<float*>(dst) + begin, src, size_t(n) * sizeof(float));
      break;
    case DType::f16: {
      uint16_t* d = static_cast<uint16_t*>(dst) + begin;
#if defined(__F16C__)
      for (; i + 8 <= n; i += 8)
        _mm_storeu_si128(reinterpret_cast<__m128i*>(d + i), _mm256_cvtps_ph(_mm256_loadu_ps(src + i), 0));
#endif
      for (; i < n; ++i) d[i] = float_to_half(src[i]);
      break;
    }
    case DType::bf16: {
      uint16_t* d = static_cast<uint16_t*>(dst) + begin;
      for (; i < n; ++i) d[i] = float_to_bfloat16(src[i]);
      break;
    }
    case DType::u8:
    case DType::none:
      break;
  }
}

}  // namespace
}  // namespace lowbit
