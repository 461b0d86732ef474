// y = x @ w.T by panels (cpu/lanes_along_k.h), on instruction sets without VNNI and VBMI.
#pragma once
#include "cpu/codebook/expander.h"
#include "cpu/codebook/steps.h"

namespace lowbit {
namespace codebook {
namespace {

struct Int16Prepared {
  int64_t M;
  int16_t* q;      // slice after slice, each [M, length] with length rounded up to whole vectors (zeros)
  float* inverse;  // [M]
  float* columns;  // [K, M]: x itself; only with outliers
  int64_t bytes;
  Int16Prepared(const void* prepared, const Linear& l) : M(l.M) {
    Arena a(const_cast<void*>(prepared));
    q = a.take<int16_t>(prepared_elements<Int16Dot>(M, l.weight.K));
    inverse = a.take<float>(M);
    columns = a.take<float>(l.weight.outliers ? M * l.weight.K : 0);
    bytes = a.used();
  }
};

int64_t words_bytes(const Linear& a) { return Int16Prepared(nullptr, a).bytes; }

void prepare_words(const Linear& a, void* prepared, int64_t m0, int64_t m1) {
  const int64_t K = a.weight.K;
  const Int16Prepared out(prepared, a);
  Scratch scratch(Slot::worker, size_t(K) * sizeof(float));
  float* x = static_cast<float*>(scratch.data());
  for (int64_t m = m0; m < m1; ++m) {
    to_float(a.x, a.dtype, m * K, K, x);
    const Quantizer quantize(x, K, a.x_scale);
    out.inverse[m] = quantize.inverse;
    for (int64_t k0 = 0; k0 < K; k0 += kSlice) {
      const int64_t count = min64(kSlice, K - k0), length = round_up(count, Int16Dot::kWidth);
      int16_t* q = out.q + a.M * k0 + m * length;
      std::memset(q, 0, size_t(length) * sizeof(int16_t));
      if (!quantize.zero) quantize(x + k0, count, q);
    }
  }
  if (a.weight.outliers) transpose_activations(a, m0, m1, out.columns);
}

// Panels of T.
class Int16Expander : Expander {
 public:
  Int16Expander(Arena& a, const Linear& l, const void* prepared)
      : Expander(a, l, prepared),
        x_(prepared, l),
        fixed_{FixedTable(a), FixedTable(a), FixedTable(a), FixedTable(a)},
        values_(a.take<float>(kSlice)),
        step_(a.take<float>(kPanelRows)),
        inverse_(a.take<float>(kPanelRows)),
        sums_(a.take<float>(l.weight.outliers ? kPassRows : 0)) {}

  void begin(int64_t n0, int64_t n1) {
    n0_ = n0;
    for (int64_t n = n0; n < n1; ++n) {
      step_[n - n0] = row_step(w_, n, values_);
      inverse_[n - n0] = 1 / step_[n - n0];
    }
  }

  void operator()(int64_t n, int64_t k0, int64_t k1, int16_t* out) {
    const float inverse = inverse_[n - n0_];
    if (2 * w_.group_size < entries(w_)) {  // fewer codes than entries
      codes_part(n, k0, k1, values_);
      return to_fixed(values_, k1 - k0, inverse, out);
    }
    const int64_t g0 = k0 / w_.group_size, g1 = ceil_div(k1, w_.group_size);
    load_scales(w_, n, g0, g1, scale_);
    unpack_row(w_, n, k0, k1, codes_);
    int64_t k = k0;
    for (int64_t g = g0; g < g1; ++g) {
      const int64_t end = min64((g + 1) * w_.group_size, k1), slot = n % kRowTile;
      const Key key{table_index(w_, n, g), scale_[g - g0], inverse};
      if (!(key == keys_[slot])) fixed_[slot].load(table(n, key.index).values, entries(w_), key.scale, inverse);
      keys_[slot] = key;
      look_up(codes_ + (k - k0), end - k, w_.bits, fixed_[slot], out + (k - k0));
      k = end;
    }
  }

  void finish(int64_t m0, int64_t m1, int64_t n0, int64_t n1, float* acc, int64_t ld) {
    for (int64_t m = m0; m < m1; ++m)
      for (int64_t n = 0; n < n1 - n0; ++n) {
        float& y = acc[(m - m0) * ld + n];
        y = y * step_[n] / x_.inverse[m];
      }
    if (w_.outliers) add_outlier_products(w_.outliers, x_.columns, x_.M, m0, m1, n0, n1, sums_, acc, ld);
  }

 private:
  struct Key {
    int64_t index = -1;
    float scale = 0, inverse = 0;
    bool operator==(const Key& k) const { return index == k.index && scale == k.scale && inverse == k.inverse; }
  };

  Int16Prepared x_;
  int64_t n0_ = 0;
  FixedTable fixed_[kRowTile];  // rows take turns
  Key keys_[kRowTile];
  float *values_, *step_, *inverse_, *sums_;
};

void linear_words(const Linear& a, const void* prepared, int64_t n0, int64_t n1) {
  linear_panel<Int16Dot, Int16Expander>(a, prepared, n0, n1);
}

int64_t prepared_bytes(const Linear& a) {
  return a.int8 ? words_bytes(a) : prepared_elements<FloatDot>(a.M, a.weight.K) * int64_t(sizeof(float));
}

void prepare(const Linear& a, void* prepared, int64_t m0, int64_t m1) {
  a.int8 ? prepare_words(a, prepared, m0, m1) : prepare_float(a, static_cast<float*>(prepared), m0, m1);
}

void linear(const Linear& a, const void* prepared, int64_t n0, int64_t n1) {
  a.int8 ? linear_words(a, prepared, n0, n1) : linear_panel<FloatDot, Expander>(a, prepared, n0, n1);
}

}  // namespace
}  // namespace codebook
}  // namespace lowbit
