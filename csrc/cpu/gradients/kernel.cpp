// The kernels of gradients on the vectors of cpu/simd.h; compiled once per instruction set.
#include "cpu/gradients/kernel.h"

#include "cpu/arena.h"
#include "cpu/gradients/sums_by_code.h"
#include "cpu/outliers.h"
#include "cpu/unpack.h"

namespace lowbit {
namespace gradients {
namespace {

constexpr int64_t kAhead = 512;  // bytes of codes that are fetched ahead

void sums_by_code(const ByCode& a, int64_t n0, int64_t n1) {
  const Codes& w = a.codes;
  const int64_t size = a.grouped ? w.group_size : w.K, tables = a.grouped ? w.G : 1;
  const auto layout = [&](Arena arena, uint8_t*& codes, float*& own) {
    codes = arena.take<uint8_t>(round_up(w.K, 64) + 2 * kUnpackSlack);  // a table may begin at any column
    own = arena.take<float>(a.d && !a.scales ? 0 : w.K);
    return arena.used();
  };
  uint8_t* codes;
  float* own;  // values that are not those of d
  Scratch scratch(Slot::worker, size_t(layout(Arena(nullptr), codes, own)));
  layout(Arena(scratch.data()), codes, own);
  for (int64_t k = 0; !a.d && k < w.K; ++k) own[k] = 1;
  const uint8_t* end = w.packed + w.N * w.row_bytes;
  for (int64_t n = n0; n < n1; ++n) {
    unpack(w.packed + n * w.row_bytes, end, kAhead, w.bits, w.K, codes);
    const float* values = a.d ? a.d + n * w.K : own;
    if (a.d && a.scales) {
      for (int64_t g = 0; g < w.G; ++g) {
        const float scale = a.scales[n * w.G + g];
        for (int64_t k = g * w.group_size; k < min64(w.K, (g + 1) * w.group_size); ++k) own[k] = values[k] * scale;
      }
      values = own;
    }
    for (int64_t t = 0; t < tables; ++t)
      sum_by_code(codes + t * size, values + t * size, min64(size, w.K - t * size), w.bits,
                  a.sums + ((n * tables + t) << w.bits));
  }
}

void turn(const Columns& a, int64_t m0, int64_t m1, int64_t c0, int64_t c1, float* to) {
  float tile[kTile * kTile] = {};
  for (int64_t c = c0; c < c1; c += kTile)
    for (int64_t m = 0; m < kRowsTogether; m += kTile) {
      const int64_t rows = max64(0, min64(kTile, m1 - m0 - m)), columns = min64(kTile, c1 - c);
      for (int64_t i = 0; i < kTile; ++i) {
        if (i < rows)
          to_float(a.from, a.dtype, (m0 + m + i) * a.width + c, columns, tile + i * kTile);
        else
          std::memset(tile + i * kTile, 0, kTile * sizeof *tile);
      }
      if (columns == kTile) {
        transpose16(tile, kTile, to + (c - c0) * kRowsTogether + m, kRowsTogether);
      } else {
        for (int64_t j = 0; j < columns; ++j)
          for (int64_t i = 0; i < kTile; ++i) to[(c - c0 + j) * kRowsTogether + m + i] = tile[i * kTile + j];
      }
    }
}

// sums[j] += x[columns of j] . dy for kAtOnce outliers from j on
template <int kAtOnce>
LOWBIT_INLINE void add_products(const Sampled& a, const float* dy, int64_t j) {
  const float* x[kAtOnce];
  Float sum[kAtOnce];
  LOWBIT_UNROLL for (int i = 0; i < kAtOnce; ++i) {
    x[i] = a.x_columns + outlier_column(a.outliers, j + i) * kRowsTogether;
    sum[i] = splat(0.0f);
  }
  for (int64_t m = 0; m < kRowsTogether; m += kLanes) {
    const Float of_dy = load(dy + m);
    LOWBIT_UNROLL for (int i = 0; i < kAtOnce; ++i) sum[i] = fma(of_dy, load(x[i] + m), sum[i]);
  }
  if constexpr (kAtOnce == 4)
    sum4_add(sum[0], sum[1], sum[2], sum[3], a.sums + j);
  else
    sum_add(sum[0], a.sums + j);
}

void sampled_products(const Sampled& a, int64_t n0, int64_t n1) {
  float dy[kTile * kRowsTogether];
  const int32_t* rows = a.outliers.rows;
  for (int64_t first = n0; first < n1; first += kTile) {
    const int64_t last = min64(n1, first + kTile);
    if (rows[first] == rows[last]) continue;
    turn(a.dy, a.m0, a.m1, first, last, dy);
    for (int64_t n = first; n < last; ++n) {
      const float* of_row = dy + (n - first) * kRowsTogether;
      int64_t j = rows[n];
      for (; j + 4 <= rows[n + 1]; j += 4) add_products<4>(a, of_row, j);
      for (; j < rows[n + 1]; ++j) add_products<1>(a, of_row, j);
    }
  }
}

}  // namespace

const CpuKernel LOWBIT_FOR_ISA(kernel) = {sums_by_code, turn, sampled_products};

}  // namespace gradients
}  // namespace lowbit
