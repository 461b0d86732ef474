// y = x @ w.T by panels, for every family whose weights are packed codes.
//
// For a block of output rows and a chunk of K: expand the weights once into scratch, then multiply them with every row
// of x, a register tile at a time.
// y[m,n] is always the same sum: lanes along K inside a chunk, one tree over the lanes, chunks in order. So it depends
// neither on M, nor on the tile the element falls in, nor on how N is split over threads.
//
// A family says what its weights are by an Expander, constructed once per thread:
//   Expander(Arena&, const Linear&, prepared)    takes its scratch; the arena may only be counting
//   begin(n0, n1)                                rows [n0, n1) come next, from their first column
//   operator()(n, k0, k1, Element* out)          out[k - k0] = w[n, k]; the chunks of a row come in order
//   finish(m0, m1, n0, n1, acc, ld)              what is left to do to these sums before the bias
// `prepared` is what the family's prepare() made; it begins with x as the tiles read it.
#pragma once
#include "cpu/activations.h"
#include "cpu/unpack.h"

namespace lowbit {
namespace {

constexpr int64_t kRowTile = 4;          // rows of w that are multiplied together
constexpr int64_t kChunk = 512;          // weights of 4 rows and a tile of x share the L1 cache
constexpr int64_t kPanelRows = 64;       // rows expanded together when M is large: they stay in L2
constexpr int64_t kBlockM = 384;         // rows of x per pass over the weights; a multiple of every tile
#if defined(__AVX512F__)
constexpr int kTileM = 6;                // as many accumulators as 32 registers hold
#else
constexpr int kTileM = 3;
#endif

// Codes [k0, k1) of row n land at out[k - k0]; k0 is a multiple of 32.
inline void unpack_row(const Codes& w, int64_t n, int64_t k0, int64_t k1, uint8_t* out) {
  const int64_t offset = n * w.row_bytes + k0 / 8 * w.bits, size = w.N * w.row_bytes;
  const int64_t bytes = ceil_div(k1 - k0, 8) * w.bits;
  // At M = 1 four rows take turns, which hides their streams from the hardware: fetch what comes after the other three,
  // the row's next chunk or the start of the row four further.
  const int64_t ahead = bytes + (k1 < w.K ? 0 : (kRowTile - 1) * w.row_bytes);
  unpack(w.packed + offset, w.packed + size, ahead, w.bits, k1 - k0, out);
}

// Outliers of a block of rows, added to the rows chunk after chunk.
class OutlierCursors {
 public:
  OutlierCursors(Arena& a, const Outliers& o) : outliers_(o), next_(a.take<int64_t>(o ? kPanelRows : 0)) {}
  void begin(int64_t n0, int64_t n1) {
    n0_ = n0;
    for (int64_t n = n0; outliers_ && n < n1; ++n) next_[n - n0] = outliers_.rows[n];
  }
  void add(int64_t n, int64_t k0, int64_t k1, float* out) {
    each(n, k0, k1, [&](int64_t column, float value) { out[column - k0] += value; });
  }
  // Calls run(column, value) for those in columns [k0, k1) of row n.
  template <class Run>
  void each(int64_t n, int64_t k0, int64_t k1, Run run) {
    if (!outliers_) return;
    for (int64_t& i = next_[n - n0_]; i < outliers_.rows[n + 1]; ++i) {
      const int64_t column = outlier_column(outliers_, i);
      if (column >= k1) break;
      if (column >= k0) run(column, outlier_value(outliers_, i));
    }
  }

 private:
  const Outliers& outliers_;
  int64_t* next_;
  int64_t n0_ = 0;
};

// ---------------------------------------------------------------------------------------------------------
// Elements of a panel, and what a lane does with them.

struct FloatDot {
  using Element = float;
  using Sum = Float;
  static constexpr int64_t kWidth = kLanes;
  static Sum zero() { return splat(0.0f); }
  static Float lanes(Sum s) { return s; }
  static Sum read(const float* p) { return load(p); }
  static Sum add(Sum s, Float x, Float w) { return fma(x, w, s); }
};

// Exact while a lane holds less than 2^31.
struct Int16Dot {
  using Element = int16_t;
  using Sum = Int;
  static constexpr int64_t kWidth = 2 * kLanes;
  static Sum zero() { return zero_int(); }
  static Float lanes(Sum s) { return to_float(s); }
  static Sum read(const int16_t* p) { return load_bytes(p); }
  static Sum add(Sum s, Int x, Int w) { return dot16(s, x, w); }
};

// acc[m * ld + n] += the sum of the lanes
template <int MR, int NR, class Dot>
LOWBIT_INLINE void reduce(const typename Dot::Sum (&sum)[MR][NR], float* acc, int64_t ld) {
  LOWBIT_UNROLL for (int m = 0; m < MR; ++m) {
    if (NR == 4)
      sum4_add(Dot::lanes(sum[m][0]), Dot::lanes(sum[m][1 % NR]), Dot::lanes(sum[m][2 % NR]),
               Dot::lanes(sum[m][3 % NR]), acc + m * ld);
    else
      LOWBIT_UNROLL for (int n = 0; n < NR; ++n) sum_add(Dot::lanes(sum[m][n]), acc + m * ld + n);
  }
}

// acc[m * ld + n] += sum_k x[m * length + k] * w[n * length + k]
template <int MR, int NR, class Dot>
void tile(const typename Dot::Element* x, const typename Dot::Element* w, int64_t length, float* acc, int64_t ld) {
  typename Dot::Sum sum[MR][NR];
  LOWBIT_UNROLL for (int m = 0; m < MR; ++m) LOWBIT_UNROLL for (int n = 0; n < NR; ++n) sum[m][n] = Dot::zero();
  for (int64_t k = 0; k < length; k += Dot::kWidth) {
    typename Dot::Sum wv[NR];
    LOWBIT_UNROLL for (int n = 0; n < NR; ++n) wv[n] = Dot::read(w + n * length + k);
    LOWBIT_UNROLL for (int m = 0; m < MR; ++m) {
      const auto xv = Dot::read(x + m * length + k);
      LOWBIT_UNROLL for (int n = 0; n < NR; ++n) sum[m][n] = Dot::add(sum[m][n], xv, wv[n]);
    }
  }
  reduce<MR, NR, Dot>(sum, acc, ld);
}

template <class Dot>
using Tile = void (*)(const typename Dot::Element*, const typename Dot::Element*, int64_t, float*, int64_t);

// [rows of x - 1][one row of w, or four]
template <class Dot>
constexpr Tile<Dot> kTiles[][2] = {
    {tile<1, 1, Dot>, tile<1, 4, Dot>}, {tile<2, 1, Dot>, tile<2, 4, Dot>}, {tile<3, 1, Dot>, tile<3, 4, Dot>},
#if defined(__AVX512F__)
    {tile<4, 1, Dot>, tile<4, 4, Dot>}, {tile<5, 1, Dot>, tile<5, 4, Dot>}, {tile<6, 1, Dot>, tile<6, 4, Dot>},
#endif
};

// ---------------------------------------------------------------------------------------------------------

// y[m0 + m, n0 + n] = round(acc[m * ld + n] + bias[n])
template <class Linear>
inline void write_result(const Linear& a, int64_t m0, int64_t m1, int64_t n0, int64_t n1, const float* bias, float* acc,
                         int64_t ld) {
  for (int64_t m = m0; m < m1; ++m, acc += ld) {
    if (a.bias)
      for (int64_t n = 0; n < n1 - n0; ++n) acc[n] += bias[n];
    from_float(acc, a.dtype, m * a.weight.N + n0, n1 - n0, a.y);
  }
}

// Prepared x: chunk after chunk, each [M, length] with length rounded up to whole vectors (zeros).
template <class Dot>
int64_t prepared_elements(int64_t M, int64_t K) {
  return M * round_up(K, Dot::kWidth);
}

template <class Linear>
void prepare_float(const Linear& a, float* prepared, int64_t m0, int64_t m1) {
  const int64_t K = a.weight.K;
  for (int64_t m = m0; m < m1; ++m)
    for (int64_t k0 = 0; k0 < K; k0 += kChunk) {
      const int64_t count = min64(kChunk, K - k0), length = round_up(count, kLanes);
      float* row = prepared + a.M * k0 + m * length;
      to_float(a.x, a.dtype, m * K + k0, count, row);
      for (int64_t k = count; k < length; ++k) row[k] = 0;
    }
}

template <class Dot, class Expander, class Linear>
void linear_panel(const Linear& a, const void* prepared, int64_t n_begin, int64_t n_end) {
  using Element = typename Dot::Element;
  const auto& w = a.weight;
  const int64_t block_n = a.M <= kTileM ? kRowTile : kPanelRows, block_m = min64(a.M, kBlockM);
  struct Buffers {
    Expander expand;
    Element* panel;
    float *acc, *bias;
    Buffers(Arena& arena, const Linear& l, const void* x, int64_t bn, int64_t bm)
        : expand(arena, l, x),
          panel(arena.take<Element>(bn * kChunk)),
          acc(arena.take<float>(bm * bn)),
          bias(arena.take<float>(bn)) {}
  };
  Arena count(nullptr);
  Buffers{count, a, prepared, block_n, block_m};
  Scratch scratch(Slot::worker, size_t(count.used()));
  Arena arena(scratch.data());
  Buffers b(arena, a, prepared, block_n, block_m);

  for (int64_t n0 = n_begin; n0 < n_end; n0 += block_n) {
    const int64_t n1 = min64(n0 + block_n, n_end);
    if (a.bias) to_float(a.bias, a.bias_dtype, n0, n1 - n0, b.bias);
    for (int64_t m0 = 0; m0 < a.M; m0 += block_m) {
      const int64_t m1 = min64(m0 + block_m, a.M);
      std::memset(b.acc, 0, size_t((m1 - m0) * block_n) * sizeof(float));
      b.expand.begin(n0, n1);
      for (int64_t k0 = 0; k0 < w.K; k0 += kChunk) {
        const int64_t k1 = min64(k0 + kChunk, w.K), length = round_up(k1 - k0, Dot::kWidth);
        for (int64_t n = n0; n < n1; ++n) {
          Element* row = b.panel + (n - n0) * length;
          b.expand(n, k0, k1, row);
          for (int64_t k = k1 - k0; k < length; ++k) row[k] = 0;
        }
        const Element* x = static_cast<const Element*>(prepared) + a.M * k0;
        for (int64_t n = n0; n < n1;) {
          const bool four = n + 4 <= n1;
          for (int64_t m = m0; m < m1; m += kTileM)
            kTiles<Dot>[min64(kTileM, m1 - m) - 1][four](x + m * length, b.panel + (n - n0) * length, length,
                                                         b.acc + (m - m0) * block_n + (n - n0), block_n);
          n += four ? 4 : 1;
        }
      }
      b.expand.finish(m0, m1, n0, n1, b.acc, block_n);
      write_result(a, m0, m1, n0, n1, b.bias, b.acc, block_n);
    }
  }
}

// out[0:K] = w[n, :]
template <class Expander, class Linear>
void dequantize_row(const Linear& a, int64_t n, DType dtype, void* out) {
  const int64_t K = a.weight.K;
  Arena count(nullptr);
  Expander{count, a, nullptr};
  count.take<float>(kChunk);
  Scratch scratch(Slot::worker, size_t(count.used()));
  Arena arena(scratch.data());
  Expander expand(arena, a, nullptr);
  float* values = arena.take<float>(kChunk);
  expand.begin(n, n + 1);
  for (int64_t k0 = 0; k0 < K; k0 += kChunk) {
    const int64_t k1 = min64(k0 + kChunk, K);
    float* to = dtype == DType::f32 ? static_cast<float*>(out) + k0 : values;
    expand(n, k0, k1, to);
    if (to == values) from_float(values, dtype, k0, k1 - k0, out);
  }
}

}  // namespace
}  // namespace lowbit
