// Register tiles whose lanes are output rows: a few rows of x times one or four blocks of 16 rows of w.
//
// A *step* multiplies 64 bytes per block (a word per row of w) by one word of 32 bits per row of x, broadcast:
//   Int8Dot     four codes by four int8 activations        a quad of columns is one step
//   Bf16Dot     two bf16 weights by two bf16 activations   two steps: columns (0, 2) and (1, 3) of the quad
//   FloatDot32  an fp32 weight by an fp32 activation       four steps
// A *segment* is a run of steps with one scale per row of w. At its end a tile adds to fp32 sums
//   acc[m, n] += (sum - zero[n] * x_sum[m]) * scale[n] (* x_scale[m])
// so y[m, n] is the same sequence of operations whatever the tile, M, or the split of N.
//
// The weights come from a panel that was expanded before, or (few rows of x) straight from blocks: the same words.
#pragma once
#include "cpu/blocks_layout.h"

namespace lowbit {
namespace {

constexpr int64_t kStepBytes = kPanelBlocks * 64;  // of a panel
constexpr int kTileRows = 6;
constexpr int kPieces = 3;  // int8 rows as which a row of floats is held, where it is
#if defined(__AVX512F__)
constexpr int kTileBlocks = 4;  // 6 x 4 accumulators, and what they need, fit 32 registers
constexpr int kFewRows = 4;     // of x, which the tiles multiply straight from blocks, all of a panel at a time
constexpr int kTallRows = 16;   // and a block at a time, of a tile
constexpr int kMostTall = 128;  // rows of x: unpacking codes for each tile costs less than a panel does
#else
constexpr int kTileBlocks = 1, kFewRows = 1, kTallRows = 1, kMostTall = 1;
#endif

struct Segment {
  int32_t begin, end;  // steps
  int32_t group;
};

// A value per row of a panel and group, in memory as it is stored.
struct Lanes {
  const void* values;
  DType dtype;
  int64_t step;  // elements from one group to the next

  // Of `rows` rows: one panel's are no stream that the hardware would follow.
  LOWBIT_INLINE void prefetch(int64_t group, int64_t row, int64_t rows) const {
    const int64_t size = element_size(dtype);
    const uint8_t* first = static_cast<const uint8_t*>(values) + (group * step + row) * size;
    for (int64_t i = 0; i < rows * size; i += 64) __builtin_prefetch(first + i);
  }

  template <bool kFloats = false>  // whether they are known to be fp32
  LOWBIT_INLINE Float at(int64_t group, int64_t row) const {
    const int64_t i = group * step + row;
    if (kFloats || dtype == DType::f32) return load(static_cast<const float*>(values) + i);
#if defined(__AVX512F__)
    const uint16_t* wide = static_cast<const uint16_t*>(values) + i;
    if (dtype == DType::f16) return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(wide)));
    if (dtype == DType::u8)
      return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(
          _mm_loadu_si128(reinterpret_cast<const __m128i*>(static_cast<const uint8_t*>(values) + i))));
#endif
    float v[kLanes];
    to_float(values, dtype, i, kLanes, v);
    return load(v);
  }
};

// What a tile knows of a run of segments.
struct TileArguments {
  const int32_t* x;           // [steps, rows]
  const float* x_sum;         // [segments, rows]: sums of x; not where weights are code - zero
  const float* x_scale;       // [segments, rows / pieces]: of rows held as several or quantized in groups
  const Segment* segments;
  int64_t segment_count;
  int64_t first_step;         // the step at which `weights` begins
  const uint8_t* weights;     // an expanded panel; or one in blocks
  const uint8_t* ahead;       // of blocks only: what to fetch meanwhile, as many bytes as are read; may be `weights`
  Lanes scale, zero;
  int64_t row;                // of the panel, at which the tile begins
  float* acc;                 // [rows / pieces, kPanelN], from that row on
  bool exact;                 // acc holds the bits of int32: add the sums as they are
  float moved;                // weights are held as code + moved
};

// Of each: `weights`, a part of a block's 64 bytes for step i of quad q, out of vectors `ld` bytes apart, and
// `from_codes`, the same out of a quad of codes that has been unpacked. `zero` is that of the part's rows.
// kInGroups: groups of a row of x have a scale each.
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
  static Int weights(const uint8_t* unit, int64_t ld, int part, int q, int, Float) {
    return quad<kBits>(unit, ld, part, q);
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
  static Int weights(const uint8_t* unit, int64_t ld, int part, int q, int step, Float zero) {
    return from_codes(quad<kBits>(unit, ld, part, q), step, kBits, zero);
  }
};

#if defined(__AVX512BF16__)
// Below 8 bits the weights are 2^bits + code, which is its bits behind a fixed exponent; at 8 bits they are the codes.
struct Bf16Dot {
  using Sum = Float;
  static constexpr int kSteps = 2;
  static constexpr bool kCodes = false;
  static constexpr bool kCentred = false, kMoved = true, kScaled = false;
  static float moved(int bits) { return bits < 8 ? float(1 << bits) : 0.0f; }
  static Sum start(float sum) { return splat(sum); }
  static Float lanes(Sum s) { return s; }
  static Sum add(Sum s, Int w, int32_t x) {
    asm("vdpbf16ps %2, %1, %0" : "+v"(s) : "v"(w), "v"(splat(x)));
    return s;
  }
  static Int from_codes(Int codes, int step, int bits, Float) {
    return bits < 8 ? behind_exponent(shifted(codes, bits - 7), step, bits) : rounded(codes, step);
  }
  template <int kBits>
  static Int weights(const uint8_t* unit, int64_t ld, int part, int q, int step, Float) {
    return kBits < 8 ? behind_exponent(quad_at<kBits, (7 - kBits) & 7>(unit, ld, part, q), step, kBits)
                     : rounded(quad<kBits>(unit, ld, part, q), step);
  }

 private:
  // Of codes in bits 7 - bits and up of bytes
  static Int behind_exponent(Int codes, int step, int bits) {
    const uint32_t exponent = uint32_t(127 + bits) << 7, mantissa = 0x7fu >> (7 - bits) << (7 - bits);
    return or_masked(splat(int32_t(exponent * 0x00010001u)), shifted(codes, 8 * step),
                     splat(int32_t(mantissa * 0x00010001u)));
  }

  // By way of fp32, whose upper half says it all
  static Int rounded(Int codes, int step) {
    const Int lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const auto value = [&](int byte) {  // of each lane
      const Int from = lowbit::add(splat(int32_t(0x80808000u) + byte), multiply(bit_and(lane, splat(3)), splat(4)));
      return as_int(to_float(Int(_mm512_shuffle_epi8(codes, from))));
    };
    const Int upper_halves = lowbit::add(splat(0x00210001), multiply(lane, splat(0x00020002)));
    return _mm512_permutex2var_epi16(value(step), upper_halves, value(step + 2));
  }
};
#endif

template <class Dot, int MR, int NV>
LOWBIT_INLINE void start_segment(const TileArguments& t, int64_t s, typename Dot::Sum (&sum)[MR][NV]) {
  LOWBIT_UNROLL for (int m = 0; m < MR; ++m) {
    const auto start = Dot::kMoved ? Dot::start(-t.moved * t.x_sum[s * MR + m]) : Dot::start(0);
    LOWBIT_UNROLL for (int v = 0; v < NV; ++v) sum[m][v] = start;
  }
}

// The end of a segment. P rows of x are one row, whose digits to base 256 they hold, lowest first. kFloats:
// scales and zeros are fp32.
template <class Dot, int MR, int NB, int P, bool kFloats>
LOWBIT_INLINE void end_segment(const TileArguments& t, int64_t s, const typename Dot::Sum (&sum)[MR][NB * kParts]) {
  const int64_t group = t.segments[s].group;
  const float *x_sum = t.x_sum + s * MR, *x_scale = t.x_scale + s * (MR / P);
  float* const acc = t.acc;
  LOWBIT_UNROLL for (int v = 0; v < NB * kParts; ++v) {
    const Float scale = t.scale.at<kFloats>(group, t.row + v * kLanes);
    const Float zero = Dot::kCentred ? splat(0.0f) : t.zero.at<kFloats>(group, t.row + v * kLanes);
    LOWBIT_UNROLL for (int m = 0; m < MR / P; ++m) {
      Float total = splat(0.0f);
      LOWBIT_UNROLL for (int p = P - 1; p >= 0; --p) {
        const int row = m * P + p;
        Float value = Dot::lanes(sum[row][v]);
        if (!Dot::kCentred) value = negated_fma(zero, splat(x_sum[row]), value);
        total = p == P - 1 ? value : fma(total, splat(256.0f), value);
      }
      if (P > 1) total = total * splat(x_scale[m]);
      float* to = acc + m * kPanelN + v * kLanes;
      if (Dot::kScaled)  // `scale` first: where x is large, total * x_scale may overflow though y does not
        store(to, fma(total * scale, splat(x_scale[m]), load(to)));
      else
        store(to, fma(total, scale, load(to)));
    }
  }
}

template <class Dot, int MR, int NB>
LOWBIT_INLINE void end_exact_segment(const TileArguments& t, const typename Dot::Sum (&sum)[MR][NB * kParts]) {
  LOWBIT_UNROLL for (int m = 0; m < MR; ++m) LOWBIT_UNROLL for (int v = 0; v < NB * kParts; ++v) {
    int32_t* acc = reinterpret_cast<int32_t*>(t.acc + m * kPanelN + v * kLanes);
    store(acc, add(load(acc), as_int(sum[m][v])));
  }
}

// Out of a panel: [steps, kPanelBlocks, 64 bytes].
template <class Dot, int MR, int NB, int P>
void tile_panel(const TileArguments& t) {
  constexpr int NV = NB * kParts;
  for (int64_t s = 0; s < t.segment_count; ++s) {
    typename Dot::Sum sum[MR][NV];
    start_segment<Dot>(t, s, sum);
    const uint8_t* w = t.weights + (t.segments[s].begin - t.first_step) * kStepBytes;
    const int32_t* x = t.x + int64_t(t.segments[s].begin) * MR;
    for (const int32_t* end = t.x + int64_t(t.segments[s].end) * MR; x < end; x += MR, w += kStepBytes) {
      Int wv[NV];
      LOWBIT_UNROLL for (int v = 0; v < NV; ++v) wv[v] = in_register(load_bytes(w + v * kPartBytes));
      LOWBIT_UNROLL for (int m = 0; m < MR; ++m) LOWBIT_UNROLL for (int v = 0; v < NV; ++v)
        sum[m][v] = Dot::add(sum[m][v], wv[v], x[m]);
    }
    if (t.exact)
      end_exact_segment<Dot, MR, NB>(t, sum);
    else
      end_segment<Dot, MR, NB, P, true>(t, s, sum);
  }
}

// Straight from NB blocks of a panel in blocks; segments are whole units.
template <class Dot, int MR, int NB, int kBits, int P>
void tile_blocks(const TileArguments& t) {
  constexpr int NV = NB * kParts;
  constexpr int64_t kUnitBytes = kPanelBlocks * 64 * kBits;
  const uint8_t *w = t.weights, *ahead = t.ahead;
  for (int64_t s = 0; s < t.segment_count; ++s) {
    typename Dot::Sum sum[MR][NV];
    start_segment<Dot>(t, s, sum);
    Float zero[NV];
    LOWBIT_UNROLL for (int v = 0; v < NV; ++v)
      zero[v] = Dot::kCentred ? t.zero.at(t.segments[s].group, t.row + v * kLanes) : splat(0.0f);
    const int32_t* x = t.x + int64_t(t.segments[s].begin) * MR;
    for (const int32_t* end = t.x + int64_t(t.segments[s].end) * MR; x < end; w += kUnitBytes) {
      LOWBIT_UNROLL for (int v = 0; v < NB * kBits; ++v) __builtin_prefetch(ahead + 64 * v, 0, 2);
      ahead += 64 * NB * kBits;
      LOWBIT_UNROLL for (int q = 0; q < kQuads; ++q) LOWBIT_UNROLL for (int i = 0; i < Dot::kSteps; ++i, x += MR) {
        LOWBIT_UNROLL for (int v = 0; v < NV; ++v) {
          const Int wv = Dot::template weights<kBits>(w + v / kParts * 64, kStepBytes, v % kParts, q, i, zero[v]);
          LOWBIT_UNROLL for (int m = 0; m < MR; ++m) sum[m][v] = Dot::add(sum[m][v], wv, x[m]);
        }
      }
    }
    if (t.exact) {
      end_exact_segment<Dot, MR, NB>(t, sum);
      continue;
    }
    end_segment<Dot, MR, NB, P, false>(t, s, sum);
    t.scale.prefetch(t.segments[s].group, t.row + kPanelN, NB * kBlockRows);  // of the next panel
    t.zero.prefetch(t.segments[s].group, t.row + kPanelN, NB * kBlockRows);
  }
}

// Whole units of NB blocks side by side, whose vectors are `step` bytes apart, into as many blocks of a panel: [steps,
// kPanelBlocks, 64 bytes]; `zero` is that of the blocks' rows.
template <class Dot, int kBits, int NB>
void expand_units(const uint8_t* unit, int64_t step, int64_t units, const Float* zero, uint8_t* panel) {
  for (; units > 0; --units, unit += step * kBits)
    LOWBIT_UNROLL for (int q = 0; q < kQuads; ++q) LOWBIT_UNROLL for (int i = 0; i < Dot::kSteps; ++i) {
      LOWBIT_UNROLL for (int v = 0; v < NB * kParts; ++v) {
        const int block = v / kParts * 64, part = v % kParts;
        store_bytes(panel + block + part * kPartBytes,
                    Dot::template weights<kBits>(unit + block, step, part, q, i, zero[v]));
      }
      panel += kStepBytes;
    }
}

// The same out of quads of codes, [quads, 64 bytes].
template <class Dot>
void expand_quads(const uint8_t* codes, int64_t quads, int bits, const Float* zero, uint8_t* panel) {
  for (; quads > 0; --quads, codes += 64)
    LOWBIT_UNROLL for (int i = 0; i < Dot::kSteps; ++i) {
      LOWBIT_UNROLL for (int part = 0; part < kParts; ++part)
        store_bytes(panel + part * kPartBytes,
                    Dot::from_codes(load_bytes(codes + part * kPartBytes), i, bits, zero[part]));
      panel += kStepBytes;
    }
}

// ---------------------------------------------------------------------------------------------------------
// Which of them runs.

using RowTile = void (*)(const TileArguments&);

// `rows` rows of x, `pieces` of which are one, times NB blocks of an expanded panel (of more than kTileRows: one)
template <class Dot, int NB>
RowTile panel_tile(int64_t rows, int pieces) {
#if defined(__AVX512VNNI__)
  if constexpr (Dot::kSteps == 1 && !Dot::kScaled) {
    if (pieces == kPieces)
      return rows == 3    ? tile_panel<Dot, 3, NB, kPieces>
             : rows == 6  ? tile_panel<Dot, 6, NB, kPieces>
             : rows == 9  ? tile_panel<Dot, 9, 1, kPieces>
             : rows == 12 ? tile_panel<Dot, 12, 1, kPieces>
                          : tile_panel<Dot, 15, 1, kPieces>;
  }
#endif
  (void)pieces;
  switch (rows) {
    case 1: return tile_panel<Dot, 1, NB, 1>;
    case 2: return tile_panel<Dot, 2, NB, 1>;
    case 3: return tile_panel<Dot, 3, NB, 1>;
    case 4: return tile_panel<Dot, 4, NB, 1>;
    case 5: return tile_panel<Dot, 5, NB, 1>;
    case 6: return tile_panel<Dot, 6, NB, 1>;
#if defined(__AVX512F__)
    case 8: return tile_panel<Dot, 8, 1, 1>;
    case 12: return tile_panel<Dot, 12, 1, 1>;
    case 16: return tile_panel<Dot, 16, 1, 1>;
#endif
    default: return nullptr;
  }
}

// `rows` rows of x times the blocks of a panel in blocks: all four, or (of more rows than kFewRows) one
template <class Dot, int kBits>
RowTile blocks_tile_of(int64_t rows, int pieces) {
  constexpr int NB = kPanelBlocks;
#if defined(__AVX512VNNI__)
  if constexpr (Dot::kSteps == 1 && !Dot::kScaled) {
    if (pieces == kPieces)
      return rows == 3    ? tile_blocks<Dot, 3, NB, kBits, kPieces>
             : rows == 6  ? tile_blocks<Dot, 6, 1, kBits, kPieces>
             : rows == 9  ? tile_blocks<Dot, 9, 1, kBits, kPieces>
             : rows == 12 ? tile_blocks<Dot, 12, 1, kBits, kPieces>
                          : tile_blocks<Dot, 15, 1, kBits, kPieces>;
  }
#endif
  (void)pieces;
  if (rows == 1) return tile_blocks<Dot, 1, NB, kBits, 1>;
#if defined(__AVX512F__)
  switch (rows) {
    case 2: return tile_blocks<Dot, 2, NB, kBits, 1>;
    case 3: return tile_blocks<Dot, 3, NB, kBits, 1>;
    case 4: return tile_blocks<Dot, 4, NB, kBits, 1>;
    case 8: return tile_blocks<Dot, 8, 1, kBits, 1>;
    case 12: return tile_blocks<Dot, 12, 1, kBits, 1>;
    case 16: return tile_blocks<Dot, 16, 1, kBits, 1>;
  }
#endif
  return nullptr;
}

template <class Dot>
RowTile blocks_tile(int bits, int64_t rows, int pieces) {
  switch (bits) {
    case 2: return blocks_tile_of<Dot, 2>(rows, pieces);
    case 3: return blocks_tile_of<Dot, 3>(rows, pieces);
    case 4: return blocks_tile_of<Dot, 4>(rows, pieces);
    case 5: return blocks_tile_of<Dot, 5>(rows, pieces);
    case 6: return blocks_tile_of<Dot, 6>(rows, pieces);
    case 7: return blocks_tile_of<Dot, 7>(rows, pieces);
    default: return blocks_tile_of<Dot, 8>(rows, pieces);
  }
}

using Expansion = void (*)(const uint8_t*, int64_t, int64_t, const Float*, uint8_t*);

template <class Dot, int NB>
Expansion expansion(int bits) {
  switch (bits) {
    case 2: return expand_units<Dot, 2, NB>;
    case 3: return expand_units<Dot, 3, NB>;
    case 4: return expand_units<Dot, 4, NB>;
    case 5: return expand_units<Dot, 5, NB>;
    case 6: return expand_units<Dot, 6, NB>;
    case 7: return expand_units<Dot, 7, NB>;
    default: return expand_units<Dot, 8, NB>;
  }
}

}  // namespace
}  // namespace lowbit
