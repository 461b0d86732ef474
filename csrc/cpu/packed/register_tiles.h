// Register tiles whose lanes are output rows: a few rows of x times one or four blocks of w.
//
// A *segment* is a run of steps with one scale per row of w. At its end a register tile adds to fp32 sums
//   acc[m, n] += (sum - rest[n] * x_sum[m]) * scale[n] (* x_scale[m])
// where `rest` is the zero, or what the weights of the sum do not have of it. Beside minima it adds
//   acc[m, n] += ((sum - center[n] * x_sum[m]) * scale[n] - shift[n] * x_sum[m]) (* x_scale[m])    (groups.h)
// so y[m, n] is the same sequence of operations whatever the register tile, M, or the split of N.
//
// The weights come from an expanded panel or, where rows of x are few, straight from blocks. Both hold the same words.
#pragma once
#include "cpu/packed/dots.h"
#include "cpu/packed/tuning.h"

namespace lowbit {
namespace {

constexpr int kPieces = 3;      // int8 rows that hold one row of floats, and
constexpr int kFourPieces = 4;  // with the one that few rows need, which stands apart
constexpr int64_t kStepBytes = kPanelBlocks * 64;  // of a panel

struct Segment {
  int32_t begin, end;  // steps
  int32_t group;
};

// The arguments of a register tile: some segments of K.
struct TileArguments {
  const int32_t* x;           // [steps, rows of x * pieces]
  const int32_t* x_lowest;    // [steps, rows of x]: the fourth piece
  const float* x_sum;         // [segments, rows of x] sums of x, of four pieces each; only where Dot::kRest, or beside minima
  const float* x_scale;       // [segments, rows of x]: of rows held in pieces or quantized in groups
  const float* x_doubt;       // [segments, rows of x]: of rows held in pieces (prepare.h)
  const Segment* segments;
  int64_t segment_count;
  int64_t first_step;         // the step at which `weights` begins
  const uint8_t* weights;     // an expanded panel; or one in blocks
  const uint8_t* ahead;       // of blocks only: what to fetch meanwhile, as many bytes as are read; or `weights`
  StoredLanes scale, zero;    // beside minima: the center, and
  StoredLanes shift;          // only then; all three are fp32
  int64_t row;                // of the panel, at which the register tile begins
  float* acc;                 // [rows of x, kPanelN], from that row on
  float* sure;                // the same shape, of rows held in pieces: see end_segment
  bool exact;                 // acc holds the bits of int32: add the sums as they are
  float top;                  // the largest code
  bool float_zeros;           // zeros may be below 0 or above the largest code
};

template <class Dot, int MR, int NV>
LOWBIT_INLINE void start_segment(typename Dot::Sum (&sum)[MR][NV]) {
  LOWBIT_UNROLL for (int m = 0; m < MR; ++m) LOWBIT_UNROLL for (int v = 0; v < NV; ++v) sum[m][v] = Dot::start();
}

// The word of row `row` of a register tile in a step; of four pieces of a row of x the lowest comes first.
template <int P>
LOWBIT_INLINE int32_t word_of(const int32_t* x, const int32_t* lowest, int row) {
  if (P != kFourPieces) return x[row];
  return row % P == 0 ? lowest[row / P] : x[row / P * kPieces + row % P - 1];
}

// The end of a segment: adds its sums to acc. P rows hold the digits of one row of x to base 256, lowest first.
// `sure` gains what is surely in sum |x w| of the segment, |total|, less `doubt`, what the pieces of x may be off
// (prepare.h). kFloats: scales and zeros are fp32.
template <class Dot, int MR, int NB, int P, bool kFloats>
LOWBIT_INLINE void end_segment(const TileArguments& t, int64_t s, const typename Dot::Sum (&sum)[MR][NB * kParts]) {
  const int64_t group = t.segments[s].group;
  constexpr int kRows = MR / P;
  const float *x_sum = t.x_sum + s * (P > 1 ? kRows * kFourPieces : MR), *x_scale = t.x_scale + s * kRows;
  float* const acc = t.acc;
  LOWBIT_UNROLL for (int v = 0; v < NB * kParts; ++v) {
    const Float scale = t.scale.at<kFloats>(group, t.row + v * kLanes);
    const Float zero = Dot::kRest ? t.zero.at<kFloats>(group, t.row + v * kLanes) : splat(0.0f);
    const Float rest = Dot::rest(zero, t.top);
    Float range = splat(1.0f);  // the largest |code - zero|, where doubts are not of it already
    if (P > 1 && t.float_zeros) range = larger(zero, splat(t.top) - zero);
    LOWBIT_UNROLL for (int m = 0; m < kRows; ++m) {
      Float total = splat(0.0f);
      LOWBIT_UNROLL for (int p = P - 1; p >= 0; --p) {
        const int row = m * P + p, sum_of_x = P == 1 ? row : (m + 1) * kFourPieces - P + p;
        Float value = Dot::lanes(sum[row][v]);
        if (Dot::kRest) value = negated_fma(rest, splat(x_sum[sum_of_x]), value);
        total = p == P - 1 ? value : fma(total, splat(256.0f), value);
      }
      if constexpr (P > 1) {
        total = total * splat(P == kFourPieces ? x_scale[m] * (1.0f / 256) : x_scale[m]);
        float* sure = t.sure + m * kPanelN + v * kLanes;
        const Float surely = negated_fma(splat(t.x_doubt[s * kRows + m]), range, magnitude(total));
        store(sure, fma(surely, magnitude(scale), load(sure)));
      }
      float* to = acc + m * kPanelN + v * kLanes;
      if (Dot::kScaled)  // `scale` first: where x is large, total * x_scale may overflow though y does not
        store(to, fma(total * scale, splat(x_scale[m]), load(to)));
      else
        store(to, fma(total, scale, load(to)));
    }
  }
}

// The same beside minima, for any number of rows of x and vectors: sums[row * P + piece][vector].
template <class Dot, int P>
LOWBIT_SHARED void end_beside_minima(const TileArguments& t, int64_t s, const typename Dot::Sum* sums, int rows,
                                     int vectors) {
  const int64_t group = t.segments[s].group;
  for (int m = 0; m < rows; ++m) {
    const float* x_sum = t.x_sum + (s * rows + m) * (P > 1 ? kFourPieces : 1);
    const float x_scale = P > 1 || Dot::kScaled ? t.x_scale[s * rows + m] : 1.0f;
    const float unit = P == kFourPieces ? x_scale * (1.0f / 256) : x_scale;  // of the lowest digit
    float x = P > 1 ? x_sum[kFourPieces - 1] : x_sum[0];  // the sum of x
    LOWBIT_UNROLL for (int p = kFourPieces - 2; P > 1 && p >= kFourPieces - P; --p) x = x * 256.0f + x_sum[p];
    if (P > 1) x *= unit;
    for (int v = 0; v < vectors; ++v) {
      const int64_t row = t.row + v * kLanes;
      const Float scale = t.scale.at<true>(group, row), shift = t.shift.at<true>(group, row);
      const Float center = t.zero.at<true>(group, row), rest = Dot::rest(center, t.top);
      Float total = splat(0.0f);
      LOWBIT_UNROLL for (int p = P - 1; p >= 0; --p) {
        Float value = Dot::lanes(sums[(m * P + p) * vectors + v]);
        if (Dot::kRest) value = negated_fma(rest, splat(x_sum[P > 1 ? kFourPieces - P + p : 0]), value);
        total = p == P - 1 ? value : fma(total, splat(256.0f), value);
      }
      if (P > 1) total = total * splat(unit);
      const Float part = negated_fma(shift, splat(x), total * scale);
      float* to = t.acc + m * kPanelN + v * kLanes;
      store(to, Dot::kScaled ? fma(part, splat(x_scale), load(to)) : load(to) + part);
      if constexpr (P > 1) {
        float* sure = t.sure + m * kPanelN + v * kLanes;
        const Float lowest = fma(center, scale, shift), highest = fma(splat(t.top) - center, scale, -shift);
        const Float range = larger(magnitude(lowest), magnitude(highest));  // the largest |w|
        store(sure, load(sure) + negated_fma(splat(t.x_doubt[s * rows + m]), range, magnitude(part)));
      }
    }
  }
}

template <class Dot, int MR, int NB, int P>
LOWBIT_INLINE void end_beside_minima(const TileArguments& t, int64_t s, const typename Dot::Sum (&sum)[MR][NB * kParts]) {
  typename Dot::Sum held[MR * NB * kParts];  // `sum` itself stays in registers
  LOWBIT_UNROLL for (int m = 0; m < MR; ++m) LOWBIT_UNROLL for (int v = 0; v < NB * kParts; ++v)
    held[m * NB * kParts + v] = sum[m][v];
  end_beside_minima<Dot, P>(t, s, held, MR / P, NB * kParts);
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
LOWBIT_TILE void tile_panel(const TileArguments& t) {
  constexpr int NV = NB * kParts, kRows = MR / P, kWords = P > 1 ? kRows * kPieces : MR;
  for (int64_t s = 0; s < t.segment_count; ++s) {
    typename Dot::Sum sum[MR][NV];
    start_segment<Dot>(sum);
    const uint8_t* w = t.weights + (t.segments[s].begin - t.first_step) * kStepBytes;
    const int32_t* x = t.x + int64_t(t.segments[s].begin) * kWords;
    const int32_t* lowest = t.x_lowest + int64_t(t.segments[s].begin) * kRows;
    for (const int32_t* end = t.x + int64_t(t.segments[s].end) * kWords; x < end; x += kWords, w += kStepBytes) {
      Int wv[NV];
      LOWBIT_UNROLL for (int v = 0; v < NV; ++v) wv[v] = in_register(load_bytes(w + v * kPartBytes));
      LOWBIT_UNROLL for (int m = 0; m < MR; ++m) LOWBIT_UNROLL for (int v = 0; v < NV; ++v)
        sum[m][v] = Dot::add(sum[m][v], wv[v], word_of<P>(x, lowest, m));
      if (P == kFourPieces) lowest += kRows;
    }
    if (t.exact)
      end_exact_segment<Dot, MR, NB>(t, sum);
    else if (t.shift.values)
      end_beside_minima<Dot, MR, NB, P>(t, s, sum);
    else
      end_segment<Dot, MR, NB, P, true>(t, s, sum);
  }
}

// Straight from NB blocks of a panel in blocks; segments are whole chunks.
template <class Dot, int MR, int NB, int kBits, int P>
LOWBIT_TILE void tile_blocks(const TileArguments& t) {
  constexpr int NV = NB * kParts, kRows = MR / P, kWords = P > 1 ? kRows * kPieces : MR;
  constexpr int64_t kChunkBytes = kPanelBlocks * 64 * kBits;
  const uint8_t *w = t.weights, *ahead = t.ahead;
  for (int64_t s = 0; s < t.segment_count; ++s) {
    typename Dot::Sum sum[MR][NV];
    start_segment<Dot>(sum);
    typename Dot::Center center[NV];
    LOWBIT_UNROLL for (int v = 0; v < NV; ++v)
      center[v] =
          Dot::center(Dot::kCentred ? t.zero.at(t.segments[s].group, t.row + v * kLanes) : splat(0.0f), kBits);
    const int32_t* x = t.x + int64_t(t.segments[s].begin) * kWords;
    const int32_t* lowest = t.x_lowest + int64_t(t.segments[s].begin) * kRows;
    for (const int32_t* end = t.x + int64_t(t.segments[s].end) * kWords; x < end; w += kChunkBytes) {
      LOWBIT_UNROLL for (int v = 0; v < NB * kBits; ++v) __builtin_prefetch(ahead + 64 * v, 0, 2);
      ahead += 64 * NB * kBits;
      LOWBIT_UNROLL for (int q = 0; q < kQuads; ++q) LOWBIT_UNROLL for (int i = 0; i < Dot::kSteps; ++i, x += kWords) {
        LOWBIT_UNROLL for (int v = 0; v < NV; ++v) {
          Int wv = Dot::template weights<kBits>(w + v / kParts * 64, kStepBytes, v % kParts, q, i, center[v]);
          if (kBits == 8 && Dot::kCodes) wv = loaded_in_order(wv);
          LOWBIT_UNROLL for (int m = 0; m < MR; ++m)
            sum[m][v] = Dot::add(sum[m][v], wv, word_of<P>(x, lowest, m));
        }
        if (P == kFourPieces) lowest += kRows;
      }
    }
    if (t.exact) {
      end_exact_segment<Dot, MR, NB>(t, sum);
      continue;
    }
    if (t.shift.values) {
      end_beside_minima<Dot, MR, NB, P>(t, s, sum);
      continue;
    }
    end_segment<Dot, MR, NB, P, false>(t, s, sum);
    t.scale.prefetch(t.segments[s].group, t.row + kPanelN, NB * kBlockRows);  // of the next panel
    t.zero.prefetch(t.segments[s].group, t.row + kPanelN, NB * kBlockRows);
  }
}

// Whole chunks of NB blocks side by side, whose vectors are `step` bytes apart, into as many blocks of a panel: [steps,
// kPanelBlocks, 64 bytes]; `center` is that of the blocks' rows.
template <class Dot, int kBits, int NB>
LOWBIT_TILE void expand_chunks(const uint8_t* chunk, int64_t step, int64_t chunks, const typename Dot::Center* center,
                               uint8_t* panel) {
  for (; chunks > 0; --chunks, chunk += step * kBits)
    LOWBIT_UNROLL for (int q = 0; q < kQuads; ++q) LOWBIT_UNROLL for (int i = 0; i < Dot::kSteps; ++i) {
      LOWBIT_UNROLL for (int v = 0; v < NB * kParts; ++v) {
        const int block = v / kParts * 64, part = v % kParts;
        store_bytes(panel + block + part * kPartBytes,
                    Dot::template weights<kBits>(chunk + block, step, part, q, i, center[v]));
      }
      panel += kStepBytes;
    }
}

// The same out of quads of codes, [quads, 64 bytes].
template <class Dot>
LOWBIT_TILE void expand_quads(const uint8_t* codes, int64_t quads, int bits, const typename Dot::Center* center,
                              uint8_t* panel) {
  for (; quads > 0; --quads, codes += 64)
    LOWBIT_UNROLL for (int i = 0; i < Dot::kSteps; ++i) {
      LOWBIT_UNROLL for (int part = 0; part < kParts; ++part)
        store_bytes(panel + part * kPartBytes,
                    Dot::from_codes(load_bytes(codes + part * kPartBytes), i, bits, center[part]));
      panel += kStepBytes;
    }
}

// ---------------------------------------------------------------------------------------------------------
// The choice of a register tile.

using RowTile = void (*)(const TileArguments&);

template <int P>
struct Count {
  static constexpr int value = P;
};

// `rows` rows of x, each of which is `pieces` rows of the register tile, times NB blocks of an expanded panel (one
// block for more than kPanelTileRows of these)
template <class Dot, int NB>
RowTile panel_tile(int64_t rows, int pieces) {
  if constexpr (kHasVnni && Dot::kSteps == 1 && !Dot::kScaled) {
    const auto tile = [rows](auto p) -> RowTile {
      constexpr int P = decltype(p)::value;
      return rows == 1   ? tile_panel<Dot, P, NB, P>
             : rows == 2 ? tile_panel<Dot, 2 * P, P == kFourPieces ? (NB + 1) / 2 : NB, P>
             : rows == 3 ? tile_panel<Dot, 3 * P, 1, P>
             : rows == 4 ? tile_panel<Dot, 4 * P, 1, P>
                         : tile_panel<Dot, 5 * P, 1, P>;
    };
    if (pieces == kPieces) return tile(Count<kPieces>{});
    if (pieces == kFourPieces) return tile(Count<kFourPieces>{});
  }
  (void)pieces;
  if constexpr (kHasAvx512) {
    switch (rows) {
      case 8: return tile_panel<Dot, 8, 1, 1>;
      case 12: return tile_panel<Dot, 12, 1, 1>;
      case 16: return tile_panel<Dot, 16, 1, 1>;
    }
  }
  switch (rows) {
    case 1: return tile_panel<Dot, 1, NB, 1>;
    case 2: return tile_panel<Dot, 2, NB, 1>;
    case 3: return tile_panel<Dot, 3, NB, 1>;
    case 4: return tile_panel<Dot, 4, NB, 1>;
    case 5: return tile_panel<Dot, 5, NB, 1>;
    case 6: return tile_panel<Dot, 6, NB, 1>;
    default: return nullptr;
  }
}

// The same times a panel that is stored in blocks: all four of them, or one for more rows than kWideTileRows
template <class Dot, int kBits>
RowTile blocks_tile_of(int64_t rows, int pieces) {
  constexpr int NB = kPanelBlocks;
  if constexpr (kHasVnni && Dot::kSteps == 1 && !Dot::kScaled) {
    const auto tile = [rows](auto p) -> RowTile {
      constexpr int P = decltype(p)::value;
      return rows == 1   ? tile_blocks<Dot, P, NB, kBits, P>
             : rows == 2 ? tile_blocks<Dot, 2 * P, 1, kBits, P>
             : rows == 3 ? tile_blocks<Dot, 3 * P, 1, kBits, P>
             : rows == 4 ? tile_blocks<Dot, 4 * P, 1, kBits, P>
                         : tile_blocks<Dot, 5 * P, 1, kBits, P>;
    };
    if (pieces == kPieces) return tile(Count<kPieces>{});
    if (pieces == kFourPieces) return tile(Count<kFourPieces>{});
  }
  (void)pieces;
  if (rows == 1) return tile_blocks<Dot, 1, NB, kBits, 1>;
  if constexpr (kHasAvx512) {
    switch (rows) {
      case 2: return tile_blocks<Dot, 2, NB, kBits, 1>;
      case 3: return tile_blocks<Dot, 3, NB, kBits, 1>;
      case 4: return tile_blocks<Dot, 4, NB, kBits, 1>;
      case 8: return tile_blocks<Dot, 8, 1, kBits, 1>;
      case 12: return tile_blocks<Dot, 12, 1, kBits, 1>;
      case 16: return tile_blocks<Dot, 16, 1, kBits, 1>;
    }
  }
  return nullptr;
}

template <class Dot, int kBits = 2>
RowTile blocks_tile(int bits, int64_t rows, int pieces) {
  if constexpr (kBits <= 8) {
    if (bits != kBits) return blocks_tile<Dot, kBits + 1>(bits, rows, pieces);
    if constexpr (Dot::takes(kBits)) return blocks_tile_of<Dot, kBits>(rows, pieces);
  }
  return nullptr;
}

template <class Dot>
using Expansion = void (*)(const uint8_t*, int64_t, int64_t, const typename Dot::Center*, uint8_t*);

template <class Dot, int NB, int kBits = 2>
Expansion<Dot> expansion(int bits) {
  if constexpr (kBits <= 8) {
    if (bits != kBits) return expansion<Dot, NB, kBits + 1>(bits);
    if constexpr (Dot::takes(kBits)) return expand_chunks<Dot, kBits, NB>;
  }
  return nullptr;
}

}  // namespace
}  // namespace lowbit
