// The vectors of one instruction set, chosen by the compiler's flags, and the conversions written on them.
// Everything has internal linkage: the same names are compiled with different flags in different files,
// and the linker must never pick one file's copy for another. For the same reason: no std:: templates here.
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
#define LOWBIT_UNROLL _Pragma("GCC unroll 16")
#else  // what is unrolled would not fit the registers
#define LOWBIT_UNROLL _Pragma("GCC unroll 1")
#endif
// What takes part in a register tile: called, it would force the tile into memory.
#define LOWBIT_INLINE inline __attribute__((always_inline))
// What runs once per row or less, and would be copied into every kernel.
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
//   in_register(v): v, which the compiler must now hold in a register

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

// Not the intrinsics of VNNI: GCC 12 copies every accumulator twice around them, and then runs out of registers.
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
#else
inline Int in_register(Int v) { return v; }
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
#else
inline Int add(Int a, Int b) { return Int(Bits(a) + Bits(b)); }  // unsigned: may wrap around
inline Int subtract(Int a, Int b) { return Int(Bits(a) - Bits(b)); }
inline Int to_int(Float v) { return __builtin_convertvector(v, Int); }
inline Int or_masked(Int a, Int b, Int mask) { return a | (b & mask); }
#endif

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

#if defined(__AVX512F__)
// Lane i = float(src[begin + i * step]), i < n <= 16
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
