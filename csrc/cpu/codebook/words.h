// Kinds of words, on AVX-512 with VNNI and VBMI: the form in which a weight is multiplied.
//   FloatWords      float32; bfloat16 activations too where the instruction set cannot multiply them
//   Bfloat16Words   bfloat16 activations: the weight rounded as a dense bfloat16 layer's is
//   FixedWords      int8 activations: q and the fixed-point weights T (steps.h), both int16
// A kind has
//   kWords, kFloats       the words of a vector, and kWords / 16
//   kSlice                the columns of a panel
//   add(sum, x, w)        adds the products of a vector of x and one of w
//   of(values, inverse)   the words of kFloats vectors of weights; inverse: of their row's step (FixedWords only)
#pragma once
#include "cpu/codebook/tuning.h"
#include "cpu/lanes_along_k.h"

namespace lowbit {
namespace codebook {
namespace {

inline Int load_words(const void* p) { return _mm512_loadu_si512(p); }
inline void store_words(void* p, Int v) { _mm512_storeu_si512(p, v); }

struct FloatWords {
  using Element = float;
  using Sum = Float;
  static constexpr bool kFixed = false;
  static constexpr int kWords = 16, kFloats = 1;
  static constexpr int64_t kSlice = kFloatWordSlice;
  static Sum zero() { return splat(0.0f); }
  static Float lanes(Sum s) { return s; }
  static Sum add(Sum s, Int x, Int w) { return fma(_mm512_castsi512_ps(x), _mm512_castsi512_ps(w), s); }
  static Int of(const Float* values, Float /*inverse*/) { return _mm512_castps_si512(values[0]); }
};

// Where kHasBf16. Subnormal numbers count as zero, as in every bfloat16 product of these instructions.
struct Bfloat16Words {
  using Element = int16_t;
  using Sum = Float;
  static constexpr bool kFixed = false;
  static constexpr int kWords = 32, kFloats = 2;
  static constexpr int64_t kSlice = kHalfWordSlice;
  static Sum zero() { return splat(0.0f); }
  static Float lanes(Sum s) { return s; }
  static Sum add(Sum s, Int x, Int w) { return dot_bf16(s, w, x); }
  static Int of(const Float* values, Float /*inverse*/) { return round_bf16(values[0], values[1]); }
};

struct FixedWords : Int16Dot {
  static constexpr bool kFixed = true;
  static constexpr int kWords = 32, kFloats = 2;
  static constexpr int64_t kSlice = kHalfWordSlice;
  static_assert(kSlice / kLanes * 32767 * 127 < int64_t(1) << 31, "the sum of a lane must fit int32");
  static Int of(const Float* values, Float inverse) {
    const Int a = _mm512_cvtps_epi32(_mm512_mul_ps(values[0], inverse));
    const Int b = _mm512_cvtps_epi32(_mm512_mul_ps(values[1], inverse));
    // packing takes four of `a` and four of `b` in turn
    return _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7), _mm512_packs_epi32(a, b));
  }
};

// ---------------------------------------------------------------------------------------------------------
// A look-up (register_look_up.h) gives the columns of a stretch in its own order, so x is stored in that order too:
// word `lane` of vector v is column LookUp::column(v, lane).

template <class LookUp>
struct Order {
  int16_t from[LookUp::kVectors][LookUp::Words::kWords] = {};
  uint8_t to[LookUp::kColumns] = {};  // the place of a column
  constexpr Order() {
    for (int v = 0; v < LookUp::kVectors; ++v)
      for (int l = 0; l < LookUp::Words::kWords; ++l) {
        from[v][l] = int16_t(LookUp::column(v, l));
        to[LookUp::column(v, l)] = uint8_t(v * LookUp::Words::kWords + l);
      }
  }
};

template <class LookUp>
constexpr Order<LookUp> kOrder;

// `count` words in the order of columns -> in the order of stretches; whole stretches.
template <class LookUp>
void order_words(const float* in, int64_t count, float* out) {
  for (int64_t k = 0; k < count; k += LookUp::kColumns)
    LOWBIT_UNROLL for (int v = 0; v < LookUp::kVectors; ++v) {
      const __m256i from = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(kOrder<LookUp>.from[v]));
      store(out + k + v * kLanes, _mm512_i32gather_ps(_mm512_cvtepi16_epi32(from), in + k, sizeof(float)));
    }
}

template <class LookUp>
void order_words(const int16_t* in, int64_t count, int16_t* out) {
  constexpr int kWords = LookUp::Words::kWords, kVectors = LookUp::kVectors;
  static_assert(kVectors <= 4, "a stretch of words of 16 bits is at most four vectors");
  for (int64_t k = 0; k < count; k += LookUp::kColumns) {
    Int part[4];
    LOWBIT_UNROLL for (int v = 0; v < kVectors; ++v) part[v] = load_words(in + k + v * kWords);
    LOWBIT_UNROLL for (int v = 0; v < kVectors; ++v) {
      const Int from = load_words(kOrder<LookUp>.from[v]);
      const auto pick = [&](Int a, Int b) { return _mm512_permutex2var_epi16(a, from, b); };
      Int word = kVectors == 1 ? part[0] : pick(part[0], part[1 % kVectors]);
      if (kVectors == 4)
        word = _mm512_mask_blend_epi16(_mm512_test_epi16_mask(from, _mm512_set1_epi16(64)), word,
                                       pick(part[2 % kVectors], part[3 % kVectors]));
      store_words(out + k + v * kWords, word);
    }
  }
}

}  // namespace
}  // namespace codebook
}  // namespace lowbit
