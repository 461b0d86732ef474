// The kernels of the family `codebook` on the vectors of cpu/simd.h; compiled once per instruction set.
#include "cpu/lanes_along_k.h"
#include "cpu/codebook/kernel.h"

namespace lowbit {
namespace codebook {
namespace {

constexpr int64_t kMaxEntries = 256;

inline int64_t entries(const Weight& w) { return int64_t(1) << w.bits; }

// The place in `codebook` of the table that group g of row n uses.
inline int64_t table_index(const Weight& w, int64_t n, int64_t g) {
  return w.tables == Weight::Tables::tensor ? 0 : w.tables == Weight::Tables::row ? n : n * w.G + g;
}

// At least 16 entries, for one register: a smaller table repeats.
LOWBIT_SHARED void load_table(const Weight& w, int64_t index, float* out) {
  const int64_t count = entries(w);
  to_float(w.codebook, w.codebook_dtype, index * count, count, out);
  for (int64_t i = count; i < 16; ++i) out[i] = out[i - count];
}

// scale[g - g0] of row n for groups [g0, g1)
LOWBIT_SHARED void load_scales(const Weight& w, int64_t n, int64_t g0, int64_t g1, float* scale) {
  const int64_t begin = n * w.G + g0, count = g1 - g0;
  if (!w.scales) {
    for (int64_t g = 0; g < count; ++g) scale[g] = 1;
  } else if (w.scales_dtype == DType::u8) {
    const uint8_t* codes = static_cast<const uint8_t*>(w.scales) + begin;
    for (int64_t g = 0; g < count;) {
      const float absmax = w.nested.absmax[(begin + g) / 256], offset = *w.nested.offset;
      for (const int64_t end = min64(count, g + 256 - (begin + g) % 256); g < end; ++g)
        scale[g] = w.nested.codebook[codes[g]] * absmax + offset;
    }
  } else {
    to_float(w.scales, w.scales_dtype, begin, count, scale);
  }
}

#include "cpu/codebook/values.inc"

// =========================================================================================================
// Float activations

// Panels of float weights (cpu/lanes_along_k.h), and rows of them.
class Expander {
 public:
  Expander(Arena& a, const Linear& l, const void*)
      : w_(l.weight),
        tables_{Table(a), Table(a), Table(a), Table(a)},
        codes_(a.take<uint8_t>(kChunk + kUnpackSlack)),
        scale_(a.take<float>(kChunk)),
        outliers_(a, l.weight.outliers) {}

  void begin(int64_t n0, int64_t n1) { outliers_.begin(n0, n1); }

  void operator()(int64_t n, int64_t k0, int64_t k1, float* out) {
    codes_part(n, k0, k1, out);
    outliers_.add(n, k0, k1, out);
  }

  void finish(int64_t, int64_t, int64_t, int64_t, float*, int64_t) {}

 protected:
  // calls run(k, value) for the outliers in columns [k0, k1) of row n
  template <class Run>
  void each_outlier(int64_t n, int64_t k0, int64_t k1, Run run) {
    outliers_.each(n, k0, k1, run);
  }

  // the weights without their outliers
  LOWBIT_SHARED void codes_part(int64_t n, int64_t k0, int64_t k1, float* out) {
    const int64_t g0 = k0 / w_.group_size, g1 = ceil_div(k1, w_.group_size);
    load_scales(w_, n, g0, g1, scale_);
    unpack_row(w_, n, k0, k1, codes_);
    int64_t k = k0;
    for (int64_t g = g0; g < g1; ++g) {
      const int64_t end = min64((g + 1) * w_.group_size, k1), index = table_index(w_, n, g);
      look_up(codes_ + (k - k0), end - k, w_.bits, table(n, index), scale_[g - g0], out + (k - k0));
      k = end;
    }
  }

  const Table& table(int64_t n, int64_t index) {
    const int64_t slot = w_.tables == Weight::Tables::tensor ? 0 : n % kRowTile;
    if (index != loaded_[slot]) tables_[slot].load(w_, index);
    loaded_[slot] = index;
    return tables_[slot];
  }

  const Weight& w_;

 private:
  Table tables_[kRowTile];  // rows take turns
  int64_t loaded_[kRowTile] = {-1, -1, -1, -1};  // indices of the tables that are in tables_

 protected:
  uint8_t* codes_;
  float* scale_;

 private:
  OutlierCursors outliers_;
};

void dequantize(const Weight& w, int64_t n, DType dtype, void* out) {
  Linear a{};
  a.weight = w;
  dequantize_row<Expander>(a, n, dtype, out);
}

// =========================================================================================================
// Int8 activations
//
// x[m,k] = q[m,k] / inverse[m]. The weights of row n, without their outliers, are held as integers of 16 bits:
//   step[n] = (max over groups |scale| * max over the row's tables |entry|) / 32767, 1 where that is below 2^-126
//   T[n,k] = round(w[n,k] * (1 / step[n])), halves to even, in -32767..32767
//   y[m,n] = (sum_k T[n,k] * q[m,k]) * step[n] / inverse[m] + outliers on x itself
// A lane sums at most kChunk / kLanes products of up to 32767 * 127: exact in int32.

static_assert(kChunk / kLanes * 32767 * 127 < int64_t(1) << 31, "the sum of a lane must fit int32");

LOWBIT_SHARED float largest_magnitude(const float* values, int64_t n, float largest) {
  const uint32_t found = largest_bits(values, n), before = bits_of(largest);
  return float_of(found > before ? found : before);
}

inline float step_of(float scale, float entry) {
  const float step = scale * entry / 32767;
  return step < 0x1p-126f ? 1 : step;
}

// `scratch` holds kMaxEntries floats.
LOWBIT_SHARED float row_step(const Weight& w, int64_t n, float* scratch) {
  float scale = w.scales ? 0 : 1, entry = 0;
  for (int64_t g0 = 0; w.scales && g0 < w.G; g0 += kMaxEntries) {
    const int64_t g1 = min64(g0 + kMaxEntries, w.G);
    load_scales(w, n, g0, g1, scratch);
    scale = largest_magnitude(scratch, g1 - g0, scale);
  }
  const int64_t begin = table_index(w, n, 0) * entries(w);
  const int64_t count = (w.tables == Weight::Tables::group ? w.G : 1) * entries(w);  // a row's tables follow each other
  for (int64_t i = 0; i < count; i += kMaxEntries) {
    const int64_t some = min64(kMaxEntries, count - i);
    to_float(w.codebook, w.codebook_dtype, begin + i, some, scratch);
    entry = largest_magnitude(scratch, some, entry);
  }
  return step_of(scale, entry);
}

#if defined(__AVX512VBMI__)

#include "cpu/codebook/words.inc"
#include "cpu/codebook/look_up.inc"
#include "cpu/codebook/linear_words.inc"

#else

struct Int16Prepared {
  int64_t M;
  int16_t* q;      // chunk after chunk, each [M, length] with length rounded up to whole vectors (zeros)
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
    for (int64_t k0 = 0; k0 < K; k0 += kChunk) {
      const int64_t count = min64(kChunk, K - k0), length = round_up(count, Int16Dot::kWidth);
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
        values_(a.take<float>(kChunk)),
        step_(a.take<float>(kPanelRows)),
        inverse_(a.take<float>(kPanelRows)),
        sums_(a.take<float>(l.weight.outliers ? kBlockM : 0)) {}

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

#endif

}  // namespace

const CpuKernel LOWBIT_FOR_ISA(kernel) = {prepared_bytes, prepare, linear, dequantize, kRowTile};

}  // namespace codebook
}  // namespace lowbit
