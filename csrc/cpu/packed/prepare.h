// x in the form that a schedule asks for.
#pragma once
#include <type_traits>

#include "cpu/arena.h"
#include "cpu/outliers.h"
#include "cpu/packed/pieces.h"
#include "cpu/packed/schedule.h"
#include "cpu/quantizer.h"

namespace lowbit {
namespace {

// An element of x that is multiplied in float32 instead of among its segment.
struct Listed {
  int32_t segment, column;
  float x;
};

struct PreparedX {
  // Of each register tile in turn:
  int32_t* words;     // [steps, rows * pieces]
  int32_t* lowest;    // pieces only: [steps, rows], the fourth, 0 in rows that do without it
  float* sums;        // [segments, rows]: sums of x, for pieces four each; of kind f32 beside minima only
  float* scale;       // [segments, rows]; only where segments have a scale
  float* doubt;       // pieces only: [segments, rows], by how much pieces may be off, in units of what is allowed
  // Of the call:
  int32_t* total;     // exact only: [M], the sum of a row
  float* inverse;     // int8 with a scale per row only: [M]
  uint8_t* fallback;  // floats only, else null: [M]
  uint8_t* four;      // pieces only: [M], whether three pieces are too few
  int32_t* listed;    // pieces and bf16 only, else null: [M], the length of
  Listed* list;       // [M, most_listed]
  int64_t most_listed;
  float* columns;     // outliers only: x itself, [K, M]
  int64_t bytes;

  template <class Linear>
  PreparedX(const void* prepared, const Linear& a, const Schedule& p) {
    Arena arena(const_cast<void*>(prepared));
    const int64_t rows = p.tall ? round_up(a.M, p.tile) : a.M;
    words = arena.take<int32_t>(rows * p.pieces * p.row_steps());
    lowest = arena.take<int32_t>(p.kind == Kind::pieces ? rows * p.row_steps() : 0);
    sums = arena.take<float>(p.kind == Kind::f32 && !a.weight.minimum ? 0 : rows * p.sums * p.segments);
    scale = arena.take<float>(p.scaled ? rows * p.segments : 0);
    doubt = arena.take<float>(p.kind == Kind::pieces ? rows * p.segments : 0);
    total = arena.take<int32_t>(p.exact ? a.M : 0);
    inverse = arena.take<float>(p.kind == Kind::int8 && !p.scaled ? a.M : 0);
    fallback = p.kind != Kind::int8 ? arena.take<uint8_t>(a.M) : nullptr;
    four = arena.take<uint8_t>(p.kind == Kind::pieces ? a.M : 0);
    const bool lists = p.kind == Kind::pieces || p.kind == Kind::bf16;
    most_listed = a.weight.K / kColumnsPerListed + 1;
    listed = lists ? arena.take<int32_t>(a.M) : nullptr;
    list = arena.take<Listed>(lists ? a.M * most_listed : 0);
    columns = arena.take<float>(a.weight.outliers ? a.M * a.weight.K : 0);
    bytes = arena.used();
  }
};

// Rows of x on their way into register tiles.
struct RowBuffers {
  static constexpr int64_t kRows = 4;
  float* x;        // [padded]
  int32_t* words;  // [kRows, steps]
  RowBuffers(Arena& a, const Schedule& p) : x(a.take<float>(p.padded)), words(a.take<int32_t>(kRows * p.row_steps())) {}
};

inline int32_t sum_of(const int8_t* q, int64_t n) {
  int32_t total = 0;
  for (int64_t i = 0; i < n; ++i) total += q[i];
  return total;
}

// Always adds in the same order.
inline float sum_of(const float* x, int64_t n) {
  Float lanes = splat(0.0f);
  float total = 0;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) lanes = lanes + load(x + i);
  sum_add(lanes, &total);
  for (; i < n; ++i) total += x[i];
  return total;
}

inline bool needs_fallback(const float* x, int64_t n, Kind kind) {
  const uint32_t largest = largest_bits(x, n);
  return largest >= bits_of(0x1p100f) || (kind != Kind::f32 && largest && largest < bits_of(0x1p-80f));
}

// Moves elements of a row from its segments to its list.
template <class Linear>
class Lister {
 public:
  Lister(const Linear& a, const Schedule& p, const PreparedX& out, float* row, int64_t m)
      : w_(a.weight),
        p_(p),
        row_(row),
        count_(out.listed[m]),
        list_(out.list + m * out.most_listed),
        room_(out.most_listed) {
    count_ = 0;
  }

  // Those of segment s that are `chosen`, or none where they are more than `most`. x is the row; returns where the rest
  // stands. `left`: whether some were more.
  template <class Chosen>
  const float* operator()(const float* x, int64_t s, int64_t most, bool& left, Chosen chosen) {
    const int64_t begin = p_.begin(s), end = p_.end(s);
    int64_t count = 0;
    for (int64_t i = begin; i < end; ++i) count += chosen(x[i]);
    left |= count > most || count_ + count > room_;
    if (count == 0 || count > most || count_ + count > room_) return x;
    if (x != row_) std::memcpy(row_, x, size_t(p_.padded) * sizeof(float));
    for (int64_t i = begin; i < end; ++i) {
      if (!chosen(row_[i])) continue;
      const int64_t g = p_.group(s), column = p_.in_place ? i : g * w_.group_size + (i - g * p_.stride);
      list_[count_++] = {int32_t(s), int32_t(column), row_[i]};
      row_[i] = 0;
    }
    return row_;
  }

 private:
  const Codes& w_;
  const Schedule& p_;
  float* row_;
  int32_t& count_;
  Listed* list_;
  int64_t room_;
};

// A row of x in pieces. An element of a segment is off by half a unit at most, 2^-23 of the largest. That is more than
// may be where it is much smaller than the largest. `doubt` has what the elements of a segment are off beyond what each
// is allowed. What is allowed in all is allowed_units(K) units of rounding of sum |x w|; half is allowed each element,
// the other half is the unit of `doubt`, here times the largest |code - zero| unless zeros are floats or minima. end_segment
// compares with the sums of the segments. An element of y that these leave in doubt is multiplied in float32
// (kernel.cpp). So that these are few,
// - elements much larger than the mean of such a segment are listed, where they are few;
// - the row gets a fourth piece, where the sums could otherwise not tell that all is well.
template <class Linear>
void write_pieces(const Linear& a, const Schedule& p, const PreparedX& out, const RowBuffers& b, int64_t m,
                  const float* x) {
  const int64_t t = m / p.tile, i = m % p.tile, rows = p.rows(a.M, t), K = a.weight.K;
  int32_t* words = out.words + t * p.tile * p.pieces * p.row_steps() + i * p.pieces;
  int32_t* lowest = out.lowest + t * p.tile * p.row_steps() + i;
  float* sums = out.sums + (t * p.tile * p.segments + i) * p.sums;
  float *scale = out.scale + t * p.tile * p.segments + i, *doubt = out.doubt + t * p.tile * p.segments + i;
  const float share = 0x1p-25f * allowed_units(K);
  const auto& w = a.weight;
  const bool integers = w.zeros && w.zeros_dtype == DType::u8 && !w.minimum;
  const float largest_weight = !w.zeros ? float(1 << (w.bits - 1)) : integers ? float((1 << w.bits) - 1) : 1;
  const float average = surely(w.G > 1, integers) * largest_weight;
  Lister<Linear> list(a, p, out, b.x, m);
  const auto write = [&](int64_t s, int low, auto four) {
    const int64_t begin = p.begin(s), n = p.end(s) - begin, step = begin / 4;
    scale[s * rows] = power_of_two(low);
    doubt[s * rows] = largest_weight / share *
                      to_pieces<decltype(four)::value>(x + begin, n, low, share, words + step * rows * p.pieces,
                                                       rows * p.pieces, lowest + step * rows, rows,
                                                       sums + s * rows * p.sums);
    return doubt[s * rows];
  };
  float doubts = 0, norms = 0;
  for (int64_t s = 0; s < p.segments; ++s) {
    const int64_t begin = p.begin(s), n = p.end(s) - begin, columns = p.in_place ? min64(n, K - begin) : n;
    Survey found = survey(x + begin, n);
    float in_doubt = write(s, lowest_exponent(found.largest), std::false_type{});
    // What is left of a segment without its largest elements has a smaller mean.
    for (int round = 0; round < 3 && in_doubt > kListedDoubt * average * __builtin_sqrtf(found.squares); ++round) {
      const float large = kListedMeans * found.magnitudes / float(columns);
      if (!(float_of(found.largest) > large)) break;
      bool left = false;
      x = list(x, s, max64(1, n / kColumnsPerListed), left, [large](float v) { return (v < 0 ? -v : v) > large; });
      if (left) break;
      found = survey(x + begin, n);
      in_doubt = write(s, lowest_exponent(found.largest), std::false_type{});
    }
    doubts += in_doubt;
    norms += __builtin_sqrtf(found.squares);
  }
  // The fewer segments, the more their sums differ from the average.
  const float spread = 1.5f / __builtin_sqrtf(float(p.segments));
  out.four[m] = doubts > 0 && doubts > average * (1 - spread) * norms;
  if (!out.four[m]) return;
  for (int64_t s = 0; s < p.segments; ++s)
    write(s, int(bits_of(scale[s * rows]) >> 23) - 127, std::true_type{});
}

// Columns (0, 2) and (1, 3) of each quad, a word each; x holds what stood there as bf16. n is a multiple of 32.
inline void bf16_words(const float* x, int64_t n, int32_t* words) {
  const Int lane = iota();
  // Word 2*q + i: the upper halves of floats 4*q + i and 4*q + i + 2
  const Int first = add(multiply(shifted(lane, 1), splat(8)), multiply(bit_and(lane, splat(1)), splat(2)));
  const Int upper_halves = add(multiply(first, splat(0x00010001)), splat(0x00050001));
  for (int64_t i = 0; i < n; i += 32)
    store(words + i / 2, pick_words(as_int(load(x + i)), upper_halves, as_int(load(x + i + 16))));
}

// A row of x, each group of its columns with a scale of its own.
inline void quantize_groups(const Schedule& p, const float* x, int8_t* q, int64_t rows, float* sums, float* scale) {
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

// Prepares row m of x. Its words go to `words`; pieces go straight to their register tile.
template <class Linear>
void prepare_row(const Linear& a, const Schedule& p, const PreparedX& out, const RowBuffers& b, int64_t m,
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
  if (out.fallback) {
    out.fallback[m] = needs_fallback(x, p.padded, p.kind);
    if (out.fallback[m]) {
      std::memset(b.x, 0, size_t(p.padded) * sizeof(float));
      x = b.x;
    }
  }
  float* sums = out.sums + t * p.tile * p.segments + i;

  switch (p.kind) {
    case Kind::f32:
      std::memcpy(words, x, size_t(p.padded) * sizeof(float));
      for (int64_t s = 0; w.minimum && s < p.segments; ++s)
        sums[s * rows] = sum_of(x + p.begin(s), p.end(s) - p.begin(s));
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
    case Kind::pieces:
      if constexpr (kHasVnni) write_pieces(a, p, out, b, m, x);
      break;
    case Kind::bf16: {
      // Products of numbers that small could be subnormal, which count as zero.
      const auto small = [](float v) { return v != 0 && (bits_of(v) & 0x7fffffff) < bits_of(0x1p-100f); };
      Lister<Linear> list(a, p, out, b.x, m);
      bool left = false;
      for (int64_t s = 0; s < p.segments; ++s) x = list(x, s, p.padded, left, small);
      if (left) {
        out.fallback[m] = true;
        out.listed[m] = 0;
        std::memset(b.x, 0, size_t(p.padded) * sizeof(float));
        x = b.x;
      }
      bf16_words(x, p.padded, words);
      for (int64_t s = 0; s < p.segments; ++s) sums[s * rows] = sum_of(x + p.begin(s), p.end(s) - p.begin(s));
      break;
    }
  }
}

// Rows [m, m + rows) of x, of one tile.
template <class Linear>
void prepare_rows(const Linear& a, const Schedule& p, const PreparedX& out, const RowBuffers& b, int64_t m,
                  int64_t rows) {
  const int64_t t = m / p.tile, i = m % p.tile, ld = p.rows(a.M, t) * p.pieces, steps = p.row_steps();
  int32_t* tile = out.words + t * p.tile * p.pieces * steps;
  // The words of one row stand one after another; those of more rows stand side by side.
  int32_t* words = ld == 1 ? tile : b.words;
  for (int64_t j = 0; j < rows; ++j) prepare_row(a, p, out, b, m + j, words + j * steps);
  if (words == tile || p.kind == Kind::pieces) return;
  for (int64_t j = 0; j < rows;) j += interleave(words + j * steps, steps, rows - j, tile + i + j, ld);
}

template <class Linear>
void prepare_x(const Linear& a, const Schedule& p, void* prepared, int64_t m_begin, int64_t m_end) {
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
