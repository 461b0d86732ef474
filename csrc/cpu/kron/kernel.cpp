// The kernels of the family `kron` on the vectors of cpu/simd.h; compiled once per instruction set.
//
// Each task multiplies by a range of the rows of `right`. Where its columns are many (dot), lanes run along them, as in
// cpu/lanes_along_k.h: register tiles over slices of K read dense rows directly while rows of x are few, else a panel.
// Where its columns are few, a sum over lanes per element would cost more than the products. Then the range is
// transposed once, and lanes run along its rows. The product with `left` repeats over k_right or n_right, so its lanes
// run along these.
// Elements X are fp32, or bfloat16 where x and both factors are and the machine multiplies them. Then both products
// take pairs (kPair neighbours of a sum in the 32 bits of a lane), and the result of the first is rounded to bfloat16.
// y[m,n] is always the same sum: it depends only on the shapes of the factors.
#include "cpu/kron/kernel.h"

#include <utility>

#include "cpu/arena.h"
#include "cpu/kron/tuning.h"
#include "cpu/unpack.h"

namespace lowbit {
namespace kron {
namespace {

struct Half {
  uint16_t bits;
  float value() const { return half_to_float(bits); }
};
struct Bfloat16 {
  uint16_t bits;
  float value() const { return bfloat16_to_float(bits); }
};
template <class X>
constexpr DType kNative = sizeof(X) == sizeof(float) ? DType::f32 : DType::bf16;

// values[i] = 0 for i in [begin, end)
template <class X>
inline void clear(X* values, int64_t begin, int64_t end) {
  if (begin < end) std::memset(static_cast<void*>(values + begin), 0, size_t(end - begin) * sizeof(X));
}

// Vectors of activations X, and of what is multiplied with them; kPair neighbours of a sum share a lane.
template <class X>
struct Lanes;

template <>
struct Lanes<float> {
  static constexpr int64_t kPair = 1, kCount = kLanes;
  static Float get(const float* p) { return load(p); }
  static Float get_splat(const float* p) { return splat(*p); }
  static Float get(const Half* p) { return load_half(p); }
  static Float get(const Bfloat16* p) { return load_bfloat16(p); }
  static Float multiply_add(Float x, Float w, Float sum) { return fma(x, w, sum); }
};

// The steps that pairs need; for float32 they are nothing.
inline void interleave(const float*, int64_t, float*) {}
inline void round_row(const float*, int64_t, float*) {}
inline void round_pairs(int64_t, int64_t, float*, float*) {}

// Where kHasBf16
template <>
struct Lanes<Bfloat16> {
  static constexpr int64_t kPair = 2, kCount = 2 * kLanes;
  static Int get(const Bfloat16* p) { return load_bytes(p); }
  static Int get_splat(const Bfloat16* p) {  // of a pair
    int32_t pair;
    std::memcpy(&pair, p, sizeof pair);
    return splat(pair);
  }
  static Float multiply_add(Int x, Int w, Float sum) { return dot_bf16(sum, w, x); }
};

// The words first + l and second + l of two vectors of them, in lane l
inline Int word_pairs(int first, int second) {
  return lowbit::add(splat(first | second << 16), multiply(iota(), splat(0x00010001)));
}

// to[2 * i + j] = rows[j * n + i], i < n: whole vectors
inline void interleave(const Bfloat16* rows, int64_t n, Bfloat16* to) {
  const Int low = word_pairs(0, 32), high = word_pairs(16, 48);
  for (int64_t i = 0; i < n; i += 2 * kLanes) {
    const Int even = load_bytes(rows + i), odd = load_bytes(rows + n + i);
    store_bytes(to + 2 * i, pick_words(even, low, odd));
    store_bytes(to + 2 * i + 2 * kLanes, pick_words(even, high, odd));
  }
}

// to[i] = round(from[i]), i < n; reads whole vectors. Not from_float(): numbers below 2^-126 count as zero here.
inline void round_row(const float* from, int64_t n, Bfloat16* to) {
  int64_t i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes) store_bytes(to + i, round_bf16(load(from + i), load(from + i + kLanes)));
  for (; i < n; i += kLanes) store_bf16(to + i, load(from + i), n - i);
}

// t, float32 [rows, kRange] -> rounded, in place: [ceil(rows / 2), kRange, 2]; the first `columns`, in whole vectors
inline void round_pairs(int64_t rows, int64_t columns, float* t, Bfloat16*) {
  const Int halves = word_pairs(0, 16);
  for (int64_t i = 0; i < rows; i += 2)
    for (int64_t n = 0; n < columns; n += kLanes) {
      const float* pair = t + i * kRange + n;
      const Float odd = i + 1 < rows ? load(pair + kRange) : splat(0.0f);
      store_bytes(t + i / 2 * kRange + n, pick_words(round_bf16(load(pair), odd), halves));
    }
}

// =========================================================================================================
// Factors

template <class T>
inline void widen(const void* values, int64_t begin, int64_t count, float* out) {
  const T* from = static_cast<const T*>(values) + begin;
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(out + i, Lanes<float>::get(from + i));
  for (; i < count; ++i) out[i] = from[i].value();
}

struct ExpandScratch {
  uint8_t* codes;
  float *scale, *zero;
  explicit ExpandScratch(Arena& a)
      : codes(a.take<uint8_t>(kExpanded + kUnpackSlack)),
        scale(a.take<float>(kExpanded)),
        zero(a.take<float>(kExpanded)) {}
};

// out[k - k0] = value [row, k] for k in [k0, k1); k0 is a multiple of kExpanded
inline void expand(const Factor& f, int64_t row, int64_t k0, int64_t k1, const ExpandScratch& s, float* out) {
  if (f.dtype == DType::f16) return widen<Half>(f.values, row * f.K + k0, k1 - k0, out);
  if (f.dtype == DType::bf16) return widen<Bfloat16>(f.values, row * f.K + k0, k1 - k0, out);
  if (f.dtype == DType::f32) return to_float(f.values, DType::f32, row * f.K + k0, k1 - k0, out);
  for (; k0 < k1; k0 += kExpanded) {
    const int64_t end = min64(k0 + kExpanded, k1), g0 = k0 / f.group_size, g1 = ceil_div(end, f.group_size);
    const int64_t first = f.per_tensor ? 0 : row * f.G + g0;
    to_float(f.scales, f.scales_dtype, first, g1 - g0, s.scale);
    if (f.zeros) to_float(f.zeros, f.zeros_dtype, first, g1 - g0, s.zero);
    const int64_t offset = row * f.row_bytes + k0 / 8 * f.bits;
    const uint8_t* words = static_cast<const uint8_t*>(f.values);
    unpack(words + offset, words + f.total_bytes, ceil_div(end - k0, 8) * f.bits, f.bits, end - k0, s.codes);
    int64_t i = 0;
    for (int64_t g = g0; g < g1; ++g) {
      const float zero = f.zeros ? s.zero[g - g0] : float(1 << (f.bits - 1)), scale = s.scale[g - g0];
      for (const int64_t stop = min64((g + 1) * f.group_size, end) - k0; i < stop; ++i)
        out[i] = (float(s.codes[i]) - zero) * scale;
    }
    out += end - k0;
  }
}

inline void copy_row(const Factor& f, int64_t row, int64_t k0, int64_t k1, const ExpandScratch& s, float* out) {
  expand(f, row, k0, k1, s, out);
}
inline void copy_row(const Factor& f, int64_t row, int64_t k0, int64_t k1, const ExpandScratch&, Bfloat16* out) {
  std::memcpy(out, static_cast<const Bfloat16*>(f.values) + row * f.K + k0, size_t(k1 - k0) * sizeof(Bfloat16));
}

// W[n, k] is rounded as the reference rounds it: one product per term, summed over the terms in order.
void dequantize(const Weight& w, int64_t n, DType dtype, void* out) {
  const int64_t K1 = w.a.K, K2 = w.b.K, K = K1 * K2;
  struct Buffers {
    ExpandScratch s;
    float *a, *b, *sum, *result;
    Buffers(Arena& arena, const Weight& w)
        : s(arena),
          a(arena.take<float>(w.a.K)),
          b(arena.take<float>(w.b.K)),
          sum(arena.take<float>(w.a.K * w.b.K)),
          result(arena.take<float>(w.input_permutation ? w.a.K * w.b.K : 0)) {}
  };
  Arena count(nullptr);
  Buffers{count, w};
  Scratch scratch(Slot::worker, size_t(count.used()));
  Arena arena(scratch.data());
  const Buffers t(arena, w);

  if (w.output_permutation) n = w.output_permutation[n];
  for (int64_t r = 0; r < w.R; ++r) {
    expand(w.a, r * w.a.N + n / w.b.N, 0, K1, t.s, t.a);
    expand(w.b, r * w.b.N + n % w.b.N, 0, K2, t.s, t.b);
    for (int64_t k1 = 0; k1 < K1; ++k1) {
      float* row = t.sum + k1 * K2;
      if (r == 0)
        for (int64_t k2 = 0; k2 < K2; ++k2) row[k2] = t.a[k1] * t.b[k2];
      else
        for (int64_t k2 = 0; k2 < K2; ++k2) row[k2] += t.a[k1] * t.b[k2];
    }
  }
  const float* result = t.sum;
  if (w.input_permutation) {
    for (int64_t k = 0; k < K; ++k) t.result[k] = t.sum[w.input_permutation[k]];
    result = t.result;
  }
  from_float(result, dtype, 0, K, out);
}

// =========================================================================================================
// Register tiles

// acc[m * kRange + n] += sum_k x[m * length + k] * w[n * ld + k]; asks for what stands `ahead` bytes behind w, if any.
template <class X, class W, bool kAsk, int MR, int NR>
void tile_dot(const X* x, int64_t length, const W* w, int64_t ld, int64_t ahead, float* acc) {
  using Vector = Lanes<X>;
  Float sum[MR][NR];
  LOWBIT_UNROLL for (int m = 0; m < MR; ++m) LOWBIT_UNROLL for (int n = 0; n < NR; ++n) sum[m][n] = splat(0.0f);
  for (int64_t k = 0; k < length; k += Vector::kCount) {
    decltype(Vector::get(w)) wv[NR];
    LOWBIT_UNROLL for (int n = 0; n < NR; ++n) {
      wv[n] = Vector::get(w + n * ld + k);
      if (kAsk) prefetch(reinterpret_cast<const uint8_t*>(w + n * ld + k), ahead);
    }
    LOWBIT_UNROLL for (int m = 0; m < MR; ++m) {
      const auto xv = Vector::get(x + m * length + k);
      LOWBIT_UNROLL for (int n = 0; n < NR; ++n) sum[m][n] = Vector::multiply_add(xv, wv[n], sum[m][n]);
    }
  }
  LOWBIT_UNROLL for (int m = 0; m < MR; ++m) {
    if (NR == 4)
      sum4_add(sum[m][0], sum[m][1 % NR], sum[m][2 % NR], sum[m][3 % NR], acc + m * kRange);
    else
      LOWBIT_UNROLL for (int n = 0; n < NR; ++n) sum_add(sum[m][n], acc + m * kRange + n);
  }
}

// for_rows[rows of x - 1][one row of w, or four]
template <class X, class W, bool kAsk, class = std::make_integer_sequence<int, kDotTileM>>
struct DotTiles;
template <class X, class W, bool kAsk, int... m>
struct DotTiles<X, W, kAsk, std::integer_sequence<int, m...>> {
  using Tile = void (*)(const X*, int64_t, const W*, int64_t, int64_t, float*);
  static constexpr Tile for_rows[][2] = {{tile_dot<X, W, kAsk, m + 1, 1>, tile_dot<X, W, kAsk, m + 1, 4>}...};
};

// The same for `rows` rows of x and up to four of w.
template <class X, class W, bool kAsk>
void dot_tiles(const X* x, int64_t length, int64_t rows, const W* w, int64_t ld, int64_t columns, int64_t ahead,
               float* acc) {
  const bool four = columns == 4;
  for (int64_t n = 0; n < columns; n += four ? 4 : 1)
    for (int64_t m = 0; m < rows; m += kDotTileM)
      DotTiles<X, W, kAsk>::for_rows[min64(kDotTileM, rows - m) - 1][four](
          x + m * length, length, w + n * ld, ld, ahead, acc + m * kRange + n);
}

// c[m, n] = (add ? c[m, n] : 0) + sum_k l[m, k] * r[k, n], one step after the other: of rows of l, ld_l apart, and of r
// as [depth / kPair, ld_r, kPair].
template <class X, int MR, int NR>
void tile_outer(int64_t depth, const X* l, int64_t ld_l, const X* r, int64_t ld_r, float* c, int64_t ld_c, bool add) {
  using Vector = Lanes<X>;
  Float sum[MR][NR];
  LOWBIT_UNROLL for (int m = 0; m < MR; ++m) LOWBIT_UNROLL for (int n = 0; n < NR; ++n)
      sum[m][n] = add ? load(c + m * ld_c + n * kLanes) : splat(0.0f);
  for (int64_t k = 0; k < depth; k += Vector::kPair) {
    decltype(Vector::get(r)) rv[NR];
    LOWBIT_UNROLL for (int n = 0; n < NR; ++n) rv[n] = Vector::get(r + k * ld_r + n * Vector::kCount);
    LOWBIT_UNROLL for (int m = 0; m < MR; ++m) {
      const auto lv = Vector::get_splat(l + m * ld_l + k);
      LOWBIT_UNROLL for (int n = 0; n < NR; ++n) sum[m][n] = Vector::multiply_add(lv, rv[n], sum[m][n]);
    }
  }
  LOWBIT_UNROLL for (int m = 0; m < MR; ++m) LOWBIT_UNROLL for (int n = 0; n < NR; ++n)
      store(c + m * ld_c + n * kLanes, sum[m][n]);
}

// for_rows[rows of l - 1][vectors of r - 1]
template <class X>
using OuterTile = void (*)(int64_t, const X*, int64_t, const X*, int64_t, float*, int64_t, bool);
template <class X, int m, class = std::make_integer_sequence<int, kTileN>>
struct OuterTilesOfRow;
template <class X, int m, int... n>
struct OuterTilesOfRow<X, m, std::integer_sequence<int, n...>> {
  static constexpr OuterTile<X> for_vectors[] = {tile_outer<X, m, n + 1>...};
};
template <class X>
constexpr const OuterTile<X>* kOuterTiles[kTileM] = {
    OuterTilesOfRow<X, 1>::for_vectors, OuterTilesOfRow<X, 2>::for_vectors, OuterTilesOfRow<X, 3>::for_vectors,
    OuterTilesOfRow<X, 4>::for_vectors, OuterTilesOfRow<X, 5>::for_vectors, OuterTilesOfRow<X, 6>::for_vectors};

// The same for `rows` rows of l and `columns` columns of r, a multiple of kLanes.
template <class X>
void outer(int64_t rows, int64_t columns, int64_t depth, const X* l, int64_t ld_l, const X* r, int64_t ld_r, float* c,
           int64_t ld_c, bool add) {
  for (int64_t n = 0; n < columns; n += kTileN * kLanes) {
    const int64_t vectors = min64(kTileN, (columns - n) / kLanes);
    for (int64_t m = 0; m < rows; m += kTileM)
      kOuterTiles<X>[min64(kTileM, rows - m) - 1][vectors - 1](depth, l + m * ld_l, ld_l, r + n * Lanes<X>::kPair, ld_r,
                                                               c + m * ld_c + n, ld_c, add);
  }
}

// =========================================================================================================
// One call

template <class X>
struct Layout {
  static constexpr int64_t kPair = Lanes<X>::kPair, kVector = Lanes<X>::kCount;
  static constexpr int64_t kSlice = kSliceBytes / int64_t(sizeof(X));  // elements
  int64_t rows;      // of the shared matrix, per row of x
  int64_t segments;  // of the shared matrix: one, or U_r after U_r
  bool in_place;     // x is the shared matrix
  bool few;          // rows of x
  int64_t left_ld, padded;  // elements: of a row of `left` in whole lanes, of the shared matrix in whole vectors
  int64_t range, ranges, x_range, x_ranges;  // tasks: ranges of rows of `right` times ranges of rows of x

  explicit Layout(const Linear& a) {
    const Factor& right = a.right;
    rows = a.right_first ? a.left.K : a.left.N;
    segments = a.right_first ? 1 : a.R;
    in_place = !a.dot && a.right_first && a.dtype == kNative<X> && !a.source && right.K % kPair == 0;
    left_ld = round_up(a.left.K, kPair);
    padded = round_up(right.K, kVector);
    few = a.dot && a.M * rows <= kStreamRows;
    range = few ? kNarrowRange : kRange;
    ranges = ceil_div(right.N, range);
    x_range = min64(a.M, max64((a.dot ? kDotPassRows : kOuterPassRows) / rows, 1));
    x_ranges = x_range ? ceil_div(a.M, x_range) : 0;
  }
  int64_t elements(const Linear& a) const { return in_place ? 0 : segments * a.M * rows * padded; }
  // Where slice k0 of row `row` starts: slice after slice, each [M * rows, length], length in whole vectors.
  int64_t at(const Linear& a, int64_t segment, int64_t row, int64_t k0) const {
    return a.M * rows * (segment * padded + k0) + row * length(k0);
  }
  int64_t length(int64_t k0) const { return min64(kSlice, padded - k0); }
};

template <class X>
struct Shared {
  X* left;  // [R, N, left_ld]
  float* bias;
  X* matrix;
  Shared(Arena& arena, const Linear& a, const Layout<X>& l) {
    const bool left_in_place = a.left.dtype == kNative<X> && l.left_ld == a.left.K;
    left = arena.take<X>(left_in_place ? 0 : a.R * a.left.N * l.left_ld);
    bias = arena.take<float>(a.bias ? a.out_features() : 0);
    matrix = arena.take<X>(l.elements(a));
    if (left_in_place) left = static_cast<X*>(const_cast<void*>(a.left.values));
    if (l.in_place) matrix = static_cast<X*>(const_cast<void*>(a.x));
  }
};

template <class X>
int64_t shared_bytes(const Linear& a) {
  Arena arena(nullptr);
  Shared<X>{arena, a, Layout<X>(a)};
  return arena.used();
}

template <class X>
void prepare_constants(const Linear& a, void* shared) {
  const Layout<X> l(a);
  Arena arena(shared);
  const Shared<X> s(arena, a, l);
  const int64_t N = a.out_features();
  struct Buffers {
    ExpandScratch s;
    float* bias;
    Buffers(Arena& arena, int64_t N) : s(arena), bias(arena.take<float>(N)) {}
  };
  Arena count(nullptr);
  Buffers{count, N};
  Scratch scratch(Slot::worker, size_t(count.used()));
  Arena local(scratch.data());
  const Buffers b(local, N);
  const int64_t K = a.left.K;
  if (s.left != a.left.values)
    for (int64_t row = 0; row < a.R * a.left.N; ++row) {
      copy_row(a.left, row, 0, K, b.s, s.left + row * l.left_ld);
      clear(s.left + row * l.left_ld, K, l.left_ld);
    }
  if (!a.bias) return;
  to_float(a.bias, a.bias_dtype, 0, N, a.target ? b.bias : s.bias);
  for (int64_t i = 0; a.target && i < N; ++i) s.bias[i] = b.bias[a.target[i]];
}

// dst[i] = x[m, k0 + i] in the order of X; `row` is x[m] in float32 where a.source is
inline void gather(const Linear& a, int64_t m, int64_t k0, int64_t count, const float* row, float* dst) {
  if (!a.source) return to_float(a.x, a.dtype, m * a.in_features() + k0, count, dst);
  for (int64_t i = 0; i < count; ++i) dst[i] = row[a.source[k0 + i]];
}
inline void gather(const Linear& a, int64_t m, int64_t k0, int64_t count, const float*, Bfloat16* dst) {
  const Bfloat16* x = static_cast<const Bfloat16*>(a.x) + m * a.in_features();
  if (!a.source) return void(std::memcpy(static_cast<void*>(dst), x + k0, size_t(count) * sizeof(Bfloat16)));
  for (int64_t i = 0; i < count; ++i) dst[i] = x[a.source[k0 + i]];
}

// The rows of the shared matrix for rows [m0, m1) of x: X itself, or U_r = left[r] X, zero-padded to whole vectors.
template <class X>
void prepare(const Linear& a, void* shared, int64_t m0, int64_t m1) {
  constexpr int64_t kPair = Lanes<X>::kPair;
  const Layout<X> l(a);
  if (l.in_place) return;
  Arena arena(shared);
  const Shared<X> s(arena, a, l);
  const int64_t K = a.in_features(), columns = a.right.K, ld = l.padded;
  struct Buffers {
    float* row;
    X *pair, *x;  // [kPair, ld] of X; X as [left_ld / kPair, ld, kPair]
    float* u;
    Buffers(Arena& arena, const Linear& a, const Layout<X>& l)
        : row(arena.take<float>(a.source ? a.in_features() : 0)),
          pair(arena.take<X>(a.right_first ? 0 : kPair * l.padded)),
          x(arena.take<X>(a.right_first ? 0 : l.left_ld * l.padded)),
          u(arena.take<float>(a.right_first || kPair == 1 ? 0 : l.rows * l.kSlice)) {}
  };
  Arena count(nullptr);
  Buffers{count, a, l};
  Scratch scratch(Slot::worker, size_t(count.used()));
  Arena local(scratch.data());
  const Buffers b(local, a, l);

  for (int64_t m = m0; m < m1; ++m) {
    if (a.source && kPair == 1) to_float(a.x, a.dtype, m * K, K, b.row);
    if (a.right_first) {
      for (int64_t i = 0; i < l.rows; ++i)
        for (int64_t k0 = 0; k0 < columns; k0 += l.kSlice) {
          const int64_t n = min64(l.kSlice, columns - k0);
          X* to = s.matrix + l.at(a, 0, m * l.rows + i, k0);
          gather(a, m, i * columns + k0, n, b.row, to);
          clear(to, n, l.length(k0));
        }
      continue;
    }
    for (int64_t i = 0; i < a.left.K; i += kPair) {
      X* to = b.x + i * ld;
      X* rows = kPair == 1 ? to : b.pair;
      for (int64_t j = 0; j < kPair; ++j) {
        const int64_t n = i + j < a.left.K ? columns : 0;
        gather(a, m, (i + j) * columns, n, b.row, rows + j * ld);
        clear(rows + j * ld, n, ld);
      }
      interleave(rows, ld, to);
    }
    for (int64_t r = 0; r < a.R; ++r)
      for (int64_t k0 = 0; k0 < columns; k0 += l.kSlice) {
        const int64_t length = l.length(k0);
        X* to = s.matrix + l.at(a, r, m * l.rows, k0);
        float* u = kPair == 1 ? reinterpret_cast<float*>(to) : b.u;
        outer(l.rows, length, a.left.K, s.left + r * a.left.N * l.left_ld, l.left_ld, b.x + k0 * kPair, ld, u, length,
              false);
        for (int64_t i = 0; i < l.rows; ++i)  // again zero, where `left` holds an infinity
          clear(u + i * length, columns - k0, length);
        round_row(u, l.rows * length, to);
      }
  }
}

template <class X>
int64_t tasks(const Linear& a) {
  const Layout<X> l(a);
  return l.ranges * l.x_ranges;
}

template <class X>
struct Buffers {
  ExpandScratch s;
  X* panel;      // four rows of `right`: [4, slice], or a transposed range: [R, padded / kPair, kRange, kPair]
  float* acc;    // right_first: T_r of a range of x, [R, rows, kRange]; else its result [rows, kRange]
  float* out;    // [kLeftRows, kRange]
  X* rows;       // kTransposed rows of `right`
  Buffers(Arena& arena, const Linear& a, const Layout<X>& l)
      : s(arena),
        panel(arena.take<X>(a.dot ? 4 * l.kSlice : (a.R * l.padded + kTransposed * l.kPair) * kRange)),
        acc(arena.take<float>((a.right_first ? a.R : 1) * l.x_range * l.rows * kRange)),
        out(arena.take<float>(kLeftRows * kRange)),
        rows(arena.take<X>(a.dot ? 0 : kTransposed * round_up(a.right.K, kTransposed * l.kPair))) {}
};

// panel[r, k, n - n0] = right[r, n, k], zero behind the last row; of pairs, k counts them
template <class X>
void transpose(const Linear& a, const Layout<X>& l, int64_t n0, int64_t n1, const Buffers<X>& b) {
  constexpr int64_t kSquare = kTransposed * Lanes<X>::kPair;  // elements of a row
  const Factor& f = a.right;
  const int64_t ld = round_up(f.K, kSquare);
  X* panel = b.panel;
  for (int64_t r = 0; r < a.R; ++r, panel += l.padded * kRange)
    for (int64_t n = n0; n < n1; n += kTransposed) {
      for (int64_t i = 0; i < kTransposed; ++i) {
        const int64_t count = n + i < n1 ? f.K : 0;
        if (count) copy_row(f, r * f.N + n + i, 0, count, b.s, b.rows + i * ld);
        clear(b.rows + i * ld, count, ld);
      }
      // The last square may reach into the panel of the next term, which is not there yet.
      for (int64_t k = 0; k < f.K; k += kSquare) {
        float square[kTransposed * kTransposed];
        for (int64_t i = 0; i < kTransposed; ++i)
          std::memcpy(square + i * kTransposed, b.rows + i * ld + k, kTransposed * sizeof(float));
        float* to = reinterpret_cast<float*>(panel + k * kRange) + (n - n0);
        transpose16(square, kTransposed, to, kRange);
      }
    }
}

// acc = rows [row0, row0 + rows) of the shared matrix times rows [n0, n1) of `right`; T_r after T_r, or summed over r.
template <class X>
void multiply_outer(const Linear& a, const Layout<X>& l, const Shared<X>& s, int64_t row0, int64_t rows, int64_t n0,
                    int64_t n1, const Buffers<X>& b) {
  const int64_t K = a.right.K, ld = l.in_place ? K : l.padded;
  const X* panel = b.panel;
  for (int64_t r = 0; r < a.R; ++r, panel += l.padded * kRange) {
    const X* x = s.matrix + (a.right_first ? 0 : r * a.M * l.rows * ld) + row0 * ld;
    float* acc = b.acc + (a.right_first ? r * rows * kRange : 0);
    outer(rows, round_up(n1 - n0, kLanes), K, x, ld, panel, kRange, acc, kRange, !a.right_first && r > 0);
  }
}

// The product of `rows` rows of the shared matrix, x, with columns [k0, k1) of up to four rows of `right`. Where rows
// of x are few, dense rows are multiplied in place: while they were copied or multiplied, the memory would be idle in
// turn.
template <class X>
inline void multiply_four(const Layout<X>& l, const Factor& f, const X* x, int64_t length, int64_t rows, int64_t first,
                          int64_t columns, int64_t k0, int64_t k1, const Buffers<X>& b, float* acc) {
  // Four rows take turns, so the hardware does not follow their streams. We fetch what comes later in the same row or,
  // behind its end, in the row four further. Where rows of x are many, we fetch the next four rows.
  const int64_t size = element_size(f.dtype), row_bytes = f.K * size;
  const int64_t ahead = l.few ? kAhead + (k0 * size + kAhead) / row_bytes * 3 * row_bytes : 4 * row_bytes;
  const char* values = static_cast<const char*>(f.values) + first * row_bytes + k0 * size;
  if (l.few && f.dtype != DType::none && f.K % l.kVector == 0) {
    if (f.dtype == kNative<X>)
      return dot_tiles<X, X, true>(x, length, rows, reinterpret_cast<const X*>(values), f.K, columns, ahead, acc);
    if constexpr (sizeof(X) == sizeof(float)) {
      if (f.dtype == DType::f16)
        return dot_tiles<X, Half, true>(x, length, rows, reinterpret_cast<const Half*>(values), f.K, columns, ahead,
                                        acc);
      return dot_tiles<X, Bfloat16, true>(x, length, rows, reinterpret_cast<const Bfloat16*>(values), f.K, columns,
                                          ahead, acc);
    }
  }
  X* panel = b.panel;
  for (int64_t n = 0; n < columns; ++n) {
    const uint8_t* from = reinterpret_cast<const uint8_t*>(values + n * row_bytes);
    for (int64_t i = 0; f.dtype != DType::none && i < (k1 - k0) * size; i += 64) prefetch(from + i, ahead);
    copy_row(f, first + n, k0, k1, b.s, panel + n * length);
    clear(panel + n * length, k1 - k0, length);
  }
  dot_tiles<X, X, false>(x, length, rows, panel, length, columns, 0, acc);
}

template <class X>
void multiply_dot(const Linear& a, const Layout<X>& l, const Shared<X>& s, int64_t row0, int64_t rows, int64_t n0,
                  int64_t n1, const Buffers<X>& b) {
  const Factor& f = a.right;
  std::memset(b.acc, 0, size_t((a.right_first ? a.R : 1) * rows * kRange) * sizeof(float));
  for (int64_t r = 0; r < a.R; ++r) {
    float* acc = b.acc + (a.right_first ? r * rows * kRange : 0);
    // A slice of all rows of x stays in the L2 cache. Where rows of x are few, all of x does, and rows of `right`
    // stream.
    const int64_t step = l.few ? 4 : kRange;
    for (int64_t begin = n0; begin < n1; begin += step)
      for (int64_t k0 = 0; k0 < f.K; k0 += l.kSlice) {
        const X* x = s.matrix + l.at(a, a.right_first ? 0 : r, row0, k0);
        for (int64_t n = begin; n < min64(begin + step, n1); n += 4)
          multiply_four(l, f, x, l.length(k0), rows, r * f.N + n, min64(4, n1 - n), k0, min64(k0 + l.kSlice, f.K), b,
                        acc + (n - n0));
      }
  }
}

// y[i] = round(values[i - begin]) for i in [begin, begin + count)
template <class X>
inline void round_result(const float* values, DType dtype, int64_t begin, int64_t count, void* y) {
  if constexpr (kNative<X> == DType::bf16) return round_row(values, count, static_cast<X*>(y) + begin);
  from_float(values, dtype, begin, count, y);
}

// y[m, target of (n_left, n)] = round(values[n - n0] + bias) for n in [n0, n1); values are overwritten, or already in y
template <class X>
inline void write_result(const Linear& a, const Shared<X>& s, int64_t m, int64_t n_left, int64_t n0, int64_t n1,
                         float* values, bool in_y) {
  const int64_t count = n1 - n0, first = n_left * a.right.N + n0, row = m * a.out_features();
  if (a.bias)
    for (int64_t i = 0; i < count; ++i) values[i] += s.bias[first + i];
  if (in_y) return;
  if (!a.target) return round_result<X>(values, a.dtype, row + first, count, a.y);
  const int32_t* target = a.target + first;
  if (a.dtype == DType::f32) {
    float* y = static_cast<float*>(a.y) + row;
    for (int64_t i = 0; i < count; ++i) y[target[i]] = values[i];
  } else {
    uint16_t rounded[kRange], *y = static_cast<uint16_t*>(a.y) + row;
    round_result<X>(values, a.dtype, 0, count, rounded);
    for (int64_t i = 0; i < count; ++i) y[target[i]] = rounded[i];
  }
}

template <class X>
void linear(const Linear& a, const void* shared, int64_t task0, int64_t task1) {
  const Layout<X> l(a);
  Arena of_call(const_cast<void*>(shared));
  const Shared<X> s(of_call, a, l);
  Arena count(nullptr);
  Buffers<X>{count, a, l};
  Scratch scratch(Slot::worker, size_t(count.used()));
  Arena arena(scratch.data());
  const Buffers<X> b(arena, a, l);
  const int64_t left_size = a.left.N * l.left_ld;

  const auto multiply = a.dot ? multiply_dot<X> : multiply_outer<X>;
  int64_t in_panel = -1;
  for (int64_t task = task0; task < task1; ++task) {
    const int64_t range = task / l.x_ranges, n0 = range * l.range, n1 = min64(n0 + l.range, a.right.N);
    const int64_t m0 = task % l.x_ranges * l.x_range, m1 = min64(m0 + l.x_range, a.M), rows = (m1 - m0) * l.rows;
    const int64_t columns = round_up(n1 - n0, kLanes);
    if (!a.dot && range != in_panel) transpose(a, l, n0, n1, b);
    in_panel = range;
    const bool in_y = a.dtype == DType::f32 && !a.target && n1 - n0 == columns;  // the results need no copy
    multiply(a, l, s, m0 * l.rows, rows, n0, n1, b);
    for (int64_t m = m0; m < m1; ++m) {
      float* acc = b.acc + (m - m0) * l.rows * kRange;
      if (!a.right_first) {
        for (int64_t i = 0; i < a.left.N; ++i) write_result(a, s, m, i, n0, n1, acc + i * kRange, false);
        continue;
      }
      for (int64_t r = 0; r < a.R; ++r) round_pairs(a.left.K, columns, acc + r * rows * kRange, s.matrix);
      for (int64_t i0 = 0; i0 < a.left.N; i0 += kLeftRows) {
        const int64_t i1 = min64(i0 + kLeftRows, a.left.N);
        float* out = in_y ? static_cast<float*>(a.y) + m * a.out_features() + i0 * a.right.N + n0 : b.out;
        const int64_t ld = in_y ? a.right.N : kRange;
        for (int64_t r = 0; r < a.R; ++r)
          outer(i1 - i0, columns, a.left.K, s.left + r * left_size + i0 * l.left_ld, l.left_ld,
                reinterpret_cast<const X*>(acc + r * rows * kRange), kRange, out, ld, r > 0);
        for (int64_t i = i0; i < i1; ++i) write_result(a, s, m, i, n0, n1, out + (i - i0) * ld, in_y);
      }
    }
  }
}

template <class X>
constexpr CpuKernel kKernel = {shared_bytes<X>, prepare_constants<X>, prepare<X>, tasks<X>, linear<X>, dequantize};

}  // namespace

const CpuKernel LOWBIT_FOR_ISA(kernel) = kKernel<float>;
#if defined(__AVX512BF16__)  // the only object with this table
extern const CpuKernel kernel_all_bf16;
const CpuKernel kernel_all_bf16 = kKernel<Bfloat16>;
#endif

}  // namespace kron
}  // namespace lowbit
