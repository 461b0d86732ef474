// How x is held for the register tiles of register_tiles.h, and how K is cut into segments.
//
// Kinds of activations:
//   int8     as `Quantizer` gives them, a row at a time or a group of its columns
//   pieces   floats, where int8 dot products are fast (VNNI): each segment of a row as integers of 24 bits, the largest
//            of which is above 2^22, held as three digits to base 256, -128 .. 127. Each digit is a row of int8
//            activations: sums of products are exact, and cheaper than fp32 ones
//   bf16     where there are bf16 dot products and x is bf16
//   f32      floats elsewhere
// Rows of x that pieces and bf16 products cannot hold (not finite, or very large or small) are `special`.
#pragma once
#include "cpu/activations.h"
#include "cpu/packed/register_tiles.h"

namespace lowbit {
namespace {

enum class Kind { int8, pieces, bf16, f32 };

constexpr int64_t kExactK = 65536;     // K * 127 * 255 < 2^31
constexpr int64_t kFloatSegment = 256;  // columns that share the exponent of their pieces
constexpr int64_t kIntSegment = 2048;

struct Plan {
  Kind kind;
  int pieces;        // rows in which a row of x is held
  int steps;         // of a quad of columns
  int64_t tile;      // rows of x in a tile
  bool fused;        // few rows of x: tiles unpack the blocks of a panel themselves
  bool tall;         // in tall tiles, all of one height (zeros behind M), that take a block at a time
  int64_t stride;    // positions from one run to the next: a run begins with a quad
  int64_t padded;    // positions per row; zeros stand behind runs and behind K
  int64_t segment;   // positions per segment; the last of a run may be shorter
  int64_t per_run, per_group, per_x_group;  // segments
  int64_t segments;  // per row
  int64_t chunk;     // segments for which a panel is expanded at a time
  bool in_place;     // positions are columns
  bool whole_units;  // and segments begin and end with units
  bool exact;        // int8 activations and one group with an integer zero: one sum in int32 over all of K
  bool scaled;       // each segment of a row of x has a scale: pieces, and int8 activations in groups

  template <class Linear>
  Plan(const Linear& a, bool integer_zeros) {
    const auto& w = a.weight;
    kind = Kind::f32;
#if defined(__AVX512VNNI__)
    kind = Kind::pieces;
#endif
#if defined(__AVX512BF16__)
    const int64_t few = w.bits == 8 ? 3 : w.bits <= 4 ? 1 : 0;  // rows of x, which take less time in pieces
    if (a.dtype == DType::bf16 && (a.batch_invariant || a.M > few)) kind = Kind::bf16;
#endif
    if (a.int8) kind = Kind::int8;
    pieces = kind == Kind::pieces ? kPieces : 1;
    steps = kind == Kind::f32 ? FloatDot32::kSteps : kind == Kind::bf16 ? 2 : 1;
    // A run of columns has one group of w and one of x. One of their sizes divides the other, where there are groups.
    const bool x_groups = kind == Kind::int8 && a.x_group > 0 && a.x_group < w.K;
    const int64_t group = w.G == 1 ? w.K : w.group_size, x_group = x_groups ? a.x_group : w.K;
    const int64_t run = min64(group, x_group), runs = ceil_div(w.K, run);
    exact = kind == Kind::int8 && w.G == 1 && !x_groups && integer_zeros && w.K <= kExactK;
    scaled = kind == Kind::pieces || x_groups;
    in_place = runs == 1 || run % 4 == 0;
    whole_units = runs == 1 || run % kUnitColumns == 0;
    const int64_t rows = a.M * pieces;
    fused = w.blocks && whole_units && rows <= (kind == Kind::f32 ? kTallRows : kMostTall);
    tall = fused && rows > max64(kFewRows, pieces);
    const int64_t tall_tiles = ceil_div(a.M, max64(1, kTallRows / pieces)), tall_rows = ceil_div(a.M, tall_tiles);
    tile = tall ? (pieces > 1 ? tall_rows : round_up(tall_rows, 4)) : max64(1, kTileRows / pieces);
    stride = runs == 1 ? round_up(w.K, kUnitColumns) : round_up(run, 4);
    padded = in_place ? round_up(w.K, kUnitColumns) : round_up(runs * stride, kUnitColumns);
    const int64_t longest = kind == Kind::int8 ? kIntSegment : 2 * kFloatSegment;
    segment = stride <= longest ? stride : kind == Kind::int8 ? kIntSegment : kFloatSegment;
    per_run = ceil_div(stride, segment);
    per_group = per_run * ceil_div(group, run);
    per_x_group = per_run * ceil_div(x_group, run);
    segments = (runs - 1) * per_run + ceil_div(w.K - (runs - 1) * run, segment);
    chunk = max64(1, kIntSegment / steps / segment);
  }

  int64_t begin(int64_t s) const { return s / per_run * stride + s % per_run * segment; }
  int64_t end(int64_t s) const { return s + 1 == segments ? padded : begin(s + 1); }
  int64_t group(int64_t s) const { return s / per_group; }
  int64_t row_steps() const { return padded / 4 * steps; }

  // Rows of tile t of M rows of x
  int64_t rows(int64_t M, int64_t t) const { return (tall ? tile : min64(tile, M - t * tile)) * pieces; }
};

struct PreparedX {
  int32_t* words;     // tile after tile, each [steps, rows]
  float* sums;        // of segments; tile after tile, each [segments, rows]
  float* scale;       // where they have one; tile after tile, each [segments, rows / pieces]
  int32_t* total;     // exact only: [M], the sum of a row
  float* inverse;     // int8 with a scale per row only: [M]
  uint8_t* special;   // pieces and bf16 only, else null: [M]
  float* columns;     // outliers only: x itself, [K, M]
  int64_t bytes;

  template <class Linear>
  PreparedX(const void* prepared, const Linear& a, const Plan& p) {
    Arena arena(const_cast<void*>(prepared));
    const int64_t rows = p.tall ? round_up(a.M, p.tile) : a.M;
    words = arena.take<int32_t>(rows * p.pieces * p.row_steps());
    sums = arena.take<float>(p.kind == Kind::f32 ? 0 : rows * p.pieces * p.segments);
    scale = arena.take<float>(p.scaled ? rows * p.segments : 0);
    total = arena.take<int32_t>(p.exact ? a.M : 0);
    inverse = arena.take<float>(p.kind == Kind::int8 && !p.scaled ? a.M : 0);
    special = p.kind == Kind::pieces || p.kind == Kind::bf16 ? arena.take<uint8_t>(a.M) : nullptr;
    columns = arena.take<float>(a.weight.outliers ? a.M * a.weight.K : 0);
    bytes = arena.used();
  }
};

// Rows of x on their way into tiles.
struct RowBuffers {
  static constexpr int64_t kRows = 4;
  float* x;        // [padded]
  int32_t* words;  // [kRows, steps]
  RowBuffers(Arena& a, const Plan& p) : x(a.take<float>(p.padded)), words(a.take<int32_t>(kRows * p.row_steps())) {}
};

// to[s * ld + i] = words[i * steps + s] for 4, 2 or 1 rows; returns how many. steps is a multiple of 4.
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

inline int32_t sum_of(const int8_t* q, int64_t n) {
  int32_t total = 0;
  for (int64_t i = 0; i < n; ++i) total += q[i];
  return total;
}

// Always in one order.
inline float sum_of(const float* x, int64_t n) {
  Float lanes = splat(0.0f);
  float total = 0;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) lanes = lanes + load(x + i);
  sum_add(lanes, &total);
  for (; i < n; ++i) total += x[i];
  return total;
}

inline bool is_special(const float* x, int64_t n) {
  const uint32_t largest = largest_bits(x, n);
  return largest >= bits_of(0x1p100f) || (largest && largest < bits_of(0x1p-80f));
}

#if defined(__AVX512VNNI__)
// Digits of x[0:n], n a multiple of 4, lowest first: those of four neighbours are a word, words[i / 4 * rows + digit].
// sums[digit] becomes the sum of a digit; returns what an integer is worth.
inline float to_pieces(const float* x, int64_t n, int32_t* words, int64_t rows, float* sums) {
  const uint32_t largest = largest_bits(x, n);
  // Of numbers up to 127 * (1 + 256 + 65536), 0x7f7f7f, the digits fit.
  const int exponent = int(max64(int64_t((largest + 0x010101) >> 23) - 127, -80)), low = exponent - 22;
  const Float factor = splat(float_of(uint32_t(127 - low) << 23));
  const Int by_quad = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const Int ones = splat(0x01010101);
  Int total = zero_int();  // of digit p in lane 4 * quad + p
  for (int64_t i = 0; i < n; i += 16) {
    const __mmask16 some = __mmask16((1u << min64(n - i, 16)) - 1);
    Int v = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_maskz_loadu_ps(some, x + i), factor));
    __m128i digit[kPieces];
    LOWBIT_UNROLL for (int p = 0; p < kPieces; ++p) {
      digit[p] = _mm512_cvtepi32_epi8(v);
      v = _mm512_srai_epi32(_mm512_add_epi32(v, splat(128)), 8);
    }
    const Int all = _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_set_m128i(digit[1], digit[0])),
                                       _mm256_castsi128_si256(digit[2]), 1);
    const Int quads = _mm512_permutexvar_epi32(by_quad, all);  // [quad, digit]
    total = dot4<true>(total, ones, quads);
    int32_t out[16];
    store(out, quads);
    for (int64_t q = 0; q < min64(n - i, 16) / 4; ++q)
      std::memcpy(words + (i / 4 + q) * rows, out + 4 * q, kPieces * sizeof(int32_t));
  }
  int32_t lanes[16];
  store(lanes, total);
  for (int p = 0; p < kPieces; ++p) sums[p] = float(lanes[p] + lanes[4 + p] + lanes[8 + p] + lanes[12 + p]);
  return float_of(uint32_t(127 + low) << 23);
}
#endif

#if defined(__AVX512BF16__)
// Columns (0, 2) and (1, 3) of each quad, a word each; x holds what stood there as bf16. n is a multiple of 32.
inline void bf16_words(const float* x, int64_t n, int32_t* words) {
  const Int lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  // Word 2*q + i: the upper halves of floats 4*q + i and 4*q + i + 2
  const Int first = add(multiply(shifted(lane, 1), splat(8)), multiply(bit_and(lane, splat(1)), splat(2)));
  const Int upper_halves = add(multiply(first, splat(0x00010001)), splat(0x00050001));
  for (int64_t i = 0; i < n; i += 32)
    store(words + i / 2, Int(_mm512_permutex2var_epi16(as_int(load(x + i)), upper_halves, as_int(load(x + i + 16)))));
}
#endif

// A row of x, each group of its columns with a scale of its own.
inline void quantize_groups(const Plan& p, const float* x, int8_t* q, int64_t rows, float* sums, float* scale) {
  for (int64_t s = 0, next; s < p.segments; s = next) {
    next = min64(p.segments, s + p.per_x_group);
    const int64_t first = p.begin(s), n = p.end(next - 1) - first;
    const Quantizer quantize(x + first, n, nullptr);
    if (quantize.zero)
      std::memset(q + first, 0, size_t(n));
    else
      quantize(x + first, n, q + first);
    for (int64_t i = s; i < next; ++i) {
      sums[i * rows] = float(sum_of(q + p.begin(i), p.end(i) - p.begin(i)));
      scale[i * rows] = 1 / quantize.inverse;
    }
  }
}

// Row m of x; its words, but pieces, are left in `words`.
template <class Linear>
void prepare_row(const Linear& a, const Plan& p, const PreparedX& out, const RowBuffers& b, int64_t m,
                 int32_t* words) {
  const auto& w = a.weight;
  const int64_t t = m / p.tile, i = m % p.tile, rows = p.rows(a.M, t);
  const float* x = b.x;
  if (p.in_place && p.padded == w.K && a.dtype == DType::f32) {
    x = static_cast<const float*>(a.x) + m * w.K;
  } else if (p.in_place) {
    to_float(a.x, a.dtype, m * w.K, w.K, b.x);
    std::memset(b.x + w.K, 0, size_t(p.padded - w.K) * sizeof(float));
  } else {
    std::memset(b.x, 0, size_t(p.padded) * sizeof(float));
    for (int64_t g = 0; g < w.G; ++g)
      to_float(a.x, a.dtype, m * w.K + g * w.group_size, min64(w.group_size, w.K - g * w.group_size),
               b.x + g * p.stride);
  }
  if (out.special) {
    out.special[m] = is_special(x, p.padded);
    if (out.special[m]) {
      std::memset(b.x, 0, size_t(p.padded) * sizeof(float));
      x = b.x;
    }
  }
  float* sums = out.sums + t * p.tile * p.pieces * p.segments + i * p.pieces;

  switch (p.kind) {
    case Kind::f32:
      std::memcpy(words, x, size_t(p.padded) * sizeof(float));
      break;
    case Kind::int8: {
      int8_t* q = reinterpret_cast<int8_t*>(words);
      if (p.scaled) {
        quantize_groups(p, x, q, rows, sums, out.scale + t * p.tile * p.segments + i);
        break;
      }
      const Quantizer quantize(x, p.padded, a.x_scale);
      out.inverse[m] = quantize.inverse;
      if (quantize.zero)
        std::memset(q, 0, size_t(p.padded));
      else
        quantize(x, p.padded, q);
      int32_t total = 0;
      for (int64_t s = 0; s < p.segments; ++s) {
        const int32_t sum = sum_of(q + p.begin(s), p.end(s) - p.begin(s));
        sums[s * rows] = float(sum);
        total += sum;
      }
      if (p.exact) out.total[m] = total;
      break;
    }
    case Kind::pieces: {
#if defined(__AVX512VNNI__)
      float* scale = out.scale + t * p.tile * p.segments + i;
      for (int64_t s = 0; s < p.segments; ++s) {
        const int64_t begin = p.begin(s), n = p.end(s) - begin;
        int32_t* to = out.words + t * p.tile * p.pieces * p.row_steps() + i * p.pieces + begin / 4 * rows;
        scale[s * (rows / p.pieces)] = to_pieces(x + begin, n, to, rows, sums + s * rows);
      }
#endif
      break;
    }
    case Kind::bf16:
#if defined(__AVX512BF16__)
      bf16_words(x, p.padded, words);
      for (int64_t s = 0; s < p.segments; ++s) sums[s * rows] = sum_of(x + p.begin(s), p.end(s) - p.begin(s));
#endif
      break;
  }
}

// Rows [m, m + rows) of x, of one tile.
template <class Linear>
void prepare_rows(const Linear& a, const Plan& p, const PreparedX& out, const RowBuffers& b, int64_t m, int64_t rows) {
  const int64_t t = m / p.tile, i = m % p.tile, ld = p.rows(a.M, t), steps = p.row_steps();
  int32_t* tile = out.words + t * p.tile * p.pieces * steps;
  // One row of x is held as it comes; more, word beside word.
  int32_t* words = ld == 1 ? tile : b.words;
  for (int64_t j = 0; j < rows; ++j) prepare_row(a, p, out, b, m + j, words + j * steps);
  if (words == tile || p.kind == Kind::pieces) return;
  for (int64_t j = 0; j < rows;) j += interleave(words + j * steps, steps, rows - j, tile + i + j, ld);
}

template <class Linear>
void prepare_x(const Linear& a, const Plan& p, void* prepared, int64_t m_begin, int64_t m_end) {
  const PreparedX out(prepared, a, p);
  Arena count(nullptr);
  RowBuffers{count, p};
  Scratch scratch(Slot::worker, size_t(count.used()));
  Arena arena(scratch.data());
  const RowBuffers buffers(arena, p);
  for (int64_t m = m_begin, rows; m < m_end; m += rows) {
    rows = min64(min64(RowBuffers::kRows, m_end - m), p.tile - m % p.tile);
    prepare_rows(a, p, out, buffers, m, rows);
  }
  if (a.weight.outliers) transpose_activations(a, m_begin, m_end, out.columns);
}

}  // namespace
}  // namespace lowbit
