// y = x @ w.T by panels, for every family whose weights are packed codes.
//
// For some output rows and a slice of K: expand the weights once into scratch, then multiply them with every row
// of x, a register tile at a time.
// y[m,n] is always the same sum: lanes along K inside a slice, one tree over the lanes, slices in order. So it depends
// neither on M, nor on the register tile the element falls in, nor on how N is split over threads.
//
// A family gives its weights by an Expander, constructed once per thread:
//   Expander(Arena&, const Linear&, prepared)    takes its scratch; the arena may only be counting
//   begin(n0, n1)                                rows [n0, n1) come next, from their first column
//   operator()(n, k0, k1, Element* out)          out[k - k0] = w[n, k]; the slices of a row come in order
//   finish(m0, m1, n0, n1, acc, ld)              the steps between these sums and the bias
// `prepared` is what the family's prepare() made; it begins with x as the register tiles read it.
#pragma once
#include <utility>

#include "cpu/arena.h"
#include "cpu/outliers.h"
#include "cpu/rows.h"
#include "cpu/tuning.h"

namespace lowbit {
namespace {

constexpr int kTileM = kHasAvx512 ? 6 : 3;  // rows of x: as many accumulators as registers hold

// Outliers of some rows, added to the rows slice after slice.
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
// Kinds of dot products: the elements of a panel, and the sum of a lane.

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

// for_rows[rows of x - 1][one row of w, or four]
template <class Dot, class = std::make_integer_sequence<int, kTileM>>
struct Tiles;
template <class Dot, int... m>
struct Tiles<Dot, std::integer_sequence<int, m...>> {
  static constexpr Tile<Dot> for_rows[][2] = {{tile<m + 1, 1, Dot>, tile<m + 1, 4, Dot>}...};
};

// ---------------------------------------------------------------------------------------------------------

// Prepared x: slice after slice, each [M, length] with length rounded up to whole vectors (zeros).
template <class Dot>
int64_t prepared_elements(int64_t M, int64_t K) {
  return M * round_up(K, Dot::kWidth);
}

template <class Linear>
void prepare_float(const Linear& a, float* prepared, int64_t m0, int64_t m1) {
  const int64_t K = a.weight.K;
  for (int64_t m = m0; m < m1; ++m)
    for (int64_t k0 = 0; k0 < K; k0 += kSlice) {
      const int64_t count = min64(kSlice, K - k0), length = round_up(count, kLanes);
      float* row = prepared + a.M * k0 + m * length;
      to_float(a.x, a.dtype, m * K + k0, count, row);
      for (int64_t k = count; k < length; ++k) row[k] = 0;
    }
}

template <class Dot, class Expander, class Linear>
void linear_panel(const Linear& a, const void* prepared, int64_t n_begin, int64_t n_end) {
  using Element = typename Dot::Element;
  const auto& w = a.weight;
  const int64_t block_n = a.M <= kTileM ? kRowTile : kPanelRows, block_m = min64(a.M, kPassRows);
  struct Buffers {
    Expander expand;
    Element* panel;
    float *acc, *bias;
    Buffers(Arena& arena, const Linear& l, const void* x, int64_t bn, int64_t bm)
        : expand(arena, l, x),
          panel(arena.take<Element>(bn * kSlice)),
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
      for (int64_t k0 = 0; k0 < w.K; k0 += kSlice) {
        const int64_t k1 = min64(k0 + kSlice, w.K), length = round_up(k1 - k0, Dot::kWidth);
        for (int64_t n = n0; n < n1; ++n) {
          Element* row = b.panel + (n - n0) * length;
          b.expand(n, k0, k1, row);
          for (int64_t k = k1 - k0; k < length; ++k) row[k] = 0;
        }
        const Element* x = static_cast<const Element*>(prepared) + a.M * k0;
        for (int64_t n = n0; n < n1;) {
          const bool four = n + 4 <= n1;
          for (int64_t m = m0; m < m1; m += kTileM)
            Tiles<Dot>::for_rows[min64(kTileM, m1 - m) - 1][four](x + m * length, b.panel + (n - n0) * length, length,
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
  count.take<float>(kSlice);
  Scratch scratch(Slot::worker, size_t(count.used()));
  Arena arena(scratch.data());
  Expander expand(arena, a, nullptr);
  float* values = arena.take<float>(kSlice);
  expand.begin(n, n + 1);
  for (int64_t k0 = 0; k0 < K; k0 += kSlice) {
    const int64_t k1 = min64(k0 + kSlice, K);
    float* to = dtype == DType::f32 ? static_cast<float*>(out) + k0 : values;
    expand(n, k0, k1, to);
    if (to == values) from_float(values, dtype, k0, k1 - k0, out);
  }
}

}  // namespace
}  // namespace lowbit
