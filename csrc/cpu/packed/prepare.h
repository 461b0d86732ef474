// x in the form that a schedule asks for.
#pragma once
#include "cpu/arena.h"
#include "cpu/outliers.h"
#include "cpu/packed/pieces.h"
#include "cpu/packed/schedule.h"
#include "cpu/quantizer.h"

namespace lowbit {
namespace {

struct PreparedX {
  // Of each register tile in turn:
  int32_t* words;     // [steps, rows]
  float* sums;        // [segments, rows]: sums of x
  float* scale;       // [segments, rows / pieces]; only where segments have a scale
  // Of the call:
  int32_t* total;     // exact only: [M], the sum of a row
  float* inverse;     // int8 with a scale per row only: [M]
  uint8_t* fallback;   // pieces and bf16 only, else null: [M]
  float* columns;     // outliers only: x itself, [K, M]
  int64_t bytes;

  template <class Linear>
  PreparedX(const void* prepared, const Linear& a, const Schedule& p) {
    Arena arena(const_cast<void*>(prepared));
    const int64_t rows = p.tall ? round_up(a.M, p.tile) : a.M;
    words = arena.take<int32_t>(rows * p.pieces * p.row_steps());
    sums = arena.take<float>(p.kind == Kind::f32 ? 0 : rows * p.pieces * p.segments);
    scale = arena.take<float>(p.scaled ? rows * p.segments : 0);
    total = arena.take<int32_t>(p.exact ? a.M : 0);
    inverse = arena.take<float>(p.kind == Kind::int8 && !p.scaled ? a.M : 0);
    fallback = p.kind == Kind::pieces || p.kind == Kind::bf16 ? arena.take<uint8_t>(a.M) : nullptr;
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

inline bool needs_fallback(const float* x, int64_t n) {
  const uint32_t largest = largest_bits(x, n);
  return largest >= bits_of(0x1p100f) || (largest && largest < bits_of(0x1p-80f));
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
    out.fallback[m] = needs_fallback(x, p.padded);
    if (out.fallback[m]) {
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
      float* scale = out.scale + t * p.tile * p.segments + i;
      for (int64_t s = 0; s < p.segments; ++s) {
        const int64_t begin = p.begin(s), n = p.end(s) - begin;
        int32_t* to = out.words + t * p.tile * p.pieces * p.row_steps() + i * p.pieces + begin / 4 * rows;
        if constexpr (kHasVnni) scale[s * (rows / p.pieces)] = to_pieces(x + begin, n, to, rows, sums + s * rows);
      }
      break;
    }
    case Kind::bf16:
      bf16_words(x, p.padded, words);
      for (int64_t s = 0; s < p.segments; ++s) sums[s * rows] = sum_of(x + p.begin(s), p.end(s) - p.begin(s));
      break;
  }
}

// Rows [m, m + rows) of x, of one tile.
template <class Linear>
void prepare_rows(const Linear& a, const Schedule& p, const PreparedX& out, const RowBuffers& b, int64_t m,
                  int64_t rows) {
  const int64_t t = m / p.tile, i = m % p.tile, ld = p.rows(a.M, t), steps = p.row_steps();
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
