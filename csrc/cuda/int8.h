// int8 activations, on the host: what the kernels that multiply them share.
#pragma once
#include <algorithm>
#include <cstdint>

#include "common/operands.h"
#include "cuda/codes.h"

namespace lowbit {
namespace cuda {
namespace int8 {

constexpr int THREADS = 256;
// Columns of which an int32 holds the sum of products of a code and an int8, and of a zero point and an int8.
constexpr int64_t MOST_COLUMNS = int64_t(1) << 16;

// x as int8, in a workspace. Rows have whole tiles, the columns past K zeros.
struct Quantized {
  int8_t* q;       // [M, columns_of(K)]
  float* inverse;  // [M]: x is about q / inverse; NaN: of a row that is not finite
};

inline int columns_of(int64_t K) { return static_cast<int>((K + TILE - 1) / TILE * TILE); }

inline int64_t quantized_bytes(int64_t M, int64_t K) { return M * columns_of(K) + (4 * M + 15) / 16 * 16; }

inline Quantized quantized_at(void* workspace, int64_t M, int64_t K) {
  char* const begin = static_cast<char*>(workspace);
  return {reinterpret_cast<int8_t*>(begin), reinterpret_cast<float*>(begin + M * columns_of(K))};
}

// Why no kernel takes int8 activations of a call.
template <class Weight>
const char* declines(const Linear<Weight>& call) {
  const Codes& w = call.weight;
  if (call.x_group > 0 && call.x_group < w.K) return "int8 activations have one scale for each row of x";
  if (std::min(w.group_size, w.K) > MOST_COLUMNS) return "int8 activations take groups of up to 2^16 columns";
  return nullptr;
}

// Starts quantize_rows() of cuda/quantize.cuh for M rows of x.
int launch_quantize(const void* x, DType dtype, const float* x_scale, const Quantized& to, int64_t M, int64_t K,
                    void* stream);

// What becomes of sums, beside them: finish() of int8.cuh.
struct Ending {
  const float* inverse;
  const void *scales, *bias;
  void* y;
  int64_t M, N;
  int exact, scale_row;
  DType scale_dtype, bias_dtype, dtype;
};

// Starts add_splits() of cuda/quantize.cuh, where there are splits.
int launch_sum(const Ending& ending, const uint32_t* parts, const float* outlier_parts, int splits, void* stream);

}  // namespace int8
}  // namespace cuda
}  // namespace lowbit
