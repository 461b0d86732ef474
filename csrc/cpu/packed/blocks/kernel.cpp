// The rows of a block together: their codes lie side by side. Compiled once per instruction set.
#include "cpu/packed/blocks/kernel.h"

#include "cpu/packed/expand.h"

namespace lowbit {
namespace packed {
namespace blocks {
namespace {

constexpr int64_t kQuadColumns = 4 * kBlockRows;    // as many quads as rows
constexpr int64_t kCodesRow = kSlice + kQuadColumns;  // bytes; not a power of two, whose rows would share cache sets

// codes[i * kCodesRow + (k - k0)] = the code of row n + i and column k, k0 <= k < k1; k0 is a multiple of 32
inline void block_codes(const CpuWeight& w, int64_t n, int64_t k0, int64_t k1, uint8_t* codes) {
  const BlockPlace block = place_of_block(w, n);
  const int64_t chunks = ceil_div(k1 - k0, kChunkColumns), quads = chunks * kQuads;
  alignas(64) float side_by_side[(kSlice / 4 + kBlockRows) * kBlockRows];  // [quads, rows]: the bits of four codes
  to_quads(w.bits)(block.vector + k0 / kChunkColumns * w.bits * block.step, block.step, chunks,
                   reinterpret_cast<uint8_t*>(side_by_side));
  for (int64_t q = 0; q < quads; q += kBlockRows)
    transpose16(side_by_side + q * kBlockRows, min64(kBlockRows, quads - q), reinterpret_cast<float*>(codes) + q,
                kCodesRow / 4);
}

void dequantize_block(const CpuWeight& w, int64_t n, DType dtype, void* out) {
  const Outliers& o = w.outliers;
  int64_t next[kBlockRows];
  for (int64_t i = 0; i < kBlockRows; ++i) next[i] = o ? o.rows[n + i] : 0;
  alignas(64) uint8_t codes[kBlockRows * kCodesRow];
  float values[kSlice];
  for (int64_t k0 = 0; k0 < w.K; k0 += kSlice) {
    const int64_t k1 = min64(k0 + kSlice, w.K);
    block_codes(w, n, k0, k1, codes);
    for (int64_t i = 0; i < kBlockRows; ++i) {
      const int64_t begin = i * w.K + k0;
      float* to = dtype == DType::f32 ? static_cast<float*>(out) + begin : values;
      dequantize_unpacked(w, n + i, k0, k1, codes + i * kCodesRow, to);
      const int64_t end = o ? o.rows[n + i + 1] : 0;
      for (; next[i] < end && outlier_column(o, next[i]) < k1; ++next[i])
        to[outlier_column(o, next[i]) - k0] += outlier_value(o, next[i]);
      if (to == values) from_float(values, dtype, begin, k1 - k0, out);
    }
  }
}

void dequantize_rows(const CpuWeight& w, int64_t n0, int64_t n1, DType dtype, char* out) {
  const int64_t row_bytes = w.K * element_size(dtype);
  for (int64_t n = n0; n < n1;) {
    const bool whole = n % kBlockRows == 0 && n + kBlockRows <= n1 && in_block(w, n);
    (whole ? dequantize_block : packed::dequantize)(w, n, dtype, out + (n - n0) * row_bytes);
    n += whole ? kBlockRows : 1;
  }
}

}  // namespace

const CpuKernel LOWBIT_FOR_ISA(kernel) = {dequantize_rows};

}  // namespace blocks
}  // namespace packed
}  // namespace lowbit
