// The vectors of one instruction set, chosen by the compiler's flags, and the conversions written on them.
// Everything has internal linkage: the same names are compiled with different flags in different files,
// and the linker must never pick one file's copy for another. For the same reason: no std:: templates here.
#pragma once
#include <cstdint>
#include <cstring>
#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "dtype.h"

namespace lowbit {
namespace {

#define LOWBIT_UNROLL _Pragma("GCC unroll 16")

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
//   dot(acc, x, w): lane l gains sum_{j < kCodesPerLane} x[kCodesPerLane*l + j] * w[kCodesPerLane*l + j], exactly,
//     for activations x in -127..127 and codes w in 0..255 (any 9 bits where Code is int16)
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
inline Int multiply(Int a, Int b) { return a * b; }
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

#if defined(__AVX512VNNI__)
// vpdpbusd multiplies unsigned by signed bytes.
using Activation = int8_t;
using Code = uint8_t;
constexpr int kCodesPerLane = 4;
inline Int dot(Int acc, Int x, Int w) {
  asm("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(w), "v"(x));
  return acc;
}
// GCC 12 would load a vector again for each of its uses.
inline Int in_register(Int v) {
  asm("" : "+v"(v));
  return v;
}
#else
using Activation = int16_t;
using Code = int16_t;
constexpr int kCodesPerLane = 2;
inline Int dot(Int acc, Int x, Int w) { return dot16(acc, x, w); }
inline Int in_register(Int v) { return v; }
#endif
constexpr int kVector = kLanes * kCodesPerLane;  // codes in one Int
inline Int load_bytes(const void* p) { return load(static_cast<const int32_t*>(p)); }

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
