// Many rows of x times a weight of the family `packed`, on sm_90a. It equals the PyTorch line
//
//   y = torch.nn.functional.linear(x, (codes - zeros[:, group]) * scales[:, group] + outliers, bias)
//
// with group = torch.arange(K) // group_size, float32 sums and one rounding to the dtype of x.
//
// cuda/batch_sm90.cuh says how the work is shared out. Operands are those of packed/decode.cuh (codes - center, exact);
// what the center leaves of a zero point multiplies the sum of x.
#pragma once
#include "cuda/batch_sm90.cuh"
#include "cuda/packed/batch_sm90.h"

namespace lowbit {
namespace cuda {
namespace packed_batch_sm90 {

using namespace batch_sm90;

// A scale or a zero point as it is stored, so that it can be loaded long before it is used.
LOWBIT_DEVICE uint32_t bits_at(const void* values, DType dtype, int i) {
  if (dtype == DType::f32) return load(static_cast<const uint32_t*>(values) + i);
  if (dtype == DType::u8) return load(static_cast<const uint8_t*>(values) + i);
  return load(static_cast<const uint16_t*>(values) + i);
}

LOWBIT_DEVICE float float_of(uint32_t bits, DType dtype) {
  const uint16_t low = static_cast<uint16_t>(bits);
  const float f16 = to_float<DType::f16>(low), bf16 = to_float<DType::bf16>(low);  // without branches
  const float half = dtype == DType::f16 ? f16 : bf16;
  return dtype == DType::f32 ? __uint_as_float(bits) : dtype == DType::u8 ? static_cast<float>(bits) : half;
}

template <int BITS, DType T>
struct Centers {
  static constexpr int RESERVED = 0;
  using Number = Centered<BITS, T>;
  const void *scales, *zeros;
  int scale_row, scale_group, zero_row, zero_group, scale_dtype, zero_dtype;

  struct Group {
    uint32_t scale[2], zero[2];
  };
  struct Operands {
    float scale[2], residual[2];
    uint32_t center[2];
  };

  LOWBIT_DEVICE bool has_residuals() const { return zeros != nullptr && DType(zero_dtype) != DType::u8; }
  LOWBIT_DEVICE void begin(uint32_t) const {}
  LOWBIT_DEVICE void begin_rows(int) const {}

  LOWBIT_DEVICE Group fetch_group(const int (&row)[2], int group) const {
    Group found;
    LOWBIT_UNROLL
    for (int upper = 0; upper < 2; ++upper) {
      found.scale[upper] = bits_at(scales, DType(scale_dtype), row[upper] * scale_row + group * scale_group);
      found.zero[upper] = 0;
      if (zeros != nullptr)
        found.zero[upper] = bits_at(zeros, DType(zero_dtype), row[upper] * zero_row + group * zero_group);
    }
    return found;
  }

  LOWBIT_DEVICE Operands operands(const Group& group) const {
    Operands found;
    LOWBIT_UNROLL
    for (int upper = 0; upper < 2; ++upper) {
      found.scale[upper] = float_of(group.scale[upper], DType(scale_dtype));
      found.residual[upper] = 0.0f;
      int nearest = 1 << (BITS - 1);
      if (zeros != nullptr) {
        const float zero = float_of(group.zero[upper], DType(zero_dtype));
        const float largest = static_cast<float>((1 << BITS) - 1);
        nearest = static_cast<int>((zero > 0.0f ? zero < largest ? zero : largest : 0.0f) + 0.5f);
        found.residual[upper] = static_cast<float>(nearest) - zero;
      }
      found.center[upper] = Number::prepare(nearest);
    }
    return found;
  }

  LOWBIT_DEVICE uint32_t operand(const Words<BITS>& words, const Operands& of, int chunk, int upper, int j) const {
    if constexpr (Number::SPLIT) return Number::to_operand(words.codes(chunk, upper, j, 0), of.center[upper]);
    return subtract_pair<T>(words.codes(chunk, upper, j, Number::BASE * 0x00010001u), of.center[upper]);
  }
};

// Args:
//   BITS, T, X_ROWS, and what is not said here: of batch_sm90::linear().
//   scale_row, scale_group, zero_row, zero_group: between the values of neighbouring rows and groups; 0: one for all.
template <int BITS, DType T, int X_ROWS>
__global__ void __launch_bounds__(THREADS, 1)
kernel(const __grid_constant__ CUtensorMap parts_map, const __grid_constant__ CUtensorMap octets_map,
       const __grid_constant__ CUtensorMap x_map, const void* scales, const void* zeros, const void* bias,
       const void* outlier_values, const void* outlier_columns, const int32_t* outlier_rows, const uint16_t* x,
       uint16_t* y, int M, int N, int K, uint32_t group_factor, int scale_row, int scale_group, int zero_row,
       int zero_group, int scale_dtype, int zero_dtype, int bias_dtype, int outlier_dtype, int wide_columns,
       float* parts, int splits) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  const Task task = {&parts_map, &octets_map, &x_map, bias, outlier_values, outlier_columns, outlier_rows, x, y, M, N, K,
                     group_factor, bias_dtype, outlier_dtype, wide_columns, parts, splits};
  Centers<BITS, T> centers = {scales, zeros, scale_row, scale_group, zero_row, zero_group, scale_dtype, zero_dtype};
  linear<BITS, T, X_ROWS>(task, centers);
#endif
}

}  // namespace packed_batch_sm90
}  // namespace cuda
}  // namespace lowbit
