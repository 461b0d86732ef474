// Rows of float weights, for panels (cpu/lanes_along_k.h).
#pragma once
#include "cpu/codebook/table_look_up.h"
#include "cpu/lanes_along_k.h"

namespace lowbit {
namespace codebook {
namespace {

class Expander {
 public:
  Expander(Arena& a, const Linear& l, const void*)
      : w_(l.weight),
        tables_{Table(a), Table(a), Table(a), Table(a)},
        codes_(a.take<uint8_t>(kSlice + kUnpackSlack)),
        scale_(a.take<float>(kSlice)),
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

}  // namespace
}  // namespace codebook
}  // namespace lowbit
