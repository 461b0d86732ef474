// Rows of a weight of the family `packed`, as numbers. It equals the PyTorch line
//
//   out = ((codes - zeros[:, group]) * scales[:, group] + outliers)[ids].to(dtype)
//
// with group = torch.arange(K) // group_size: the difference, the product and the sum are each rounded to float32, the
// result once more to its dtype. Without ids it is all of W. cuda/gather.cuh says how.
#pragma once
#include "cuda/gather.cuh"
#include "cuda/packed/gather.h"

namespace lowbit {
namespace cuda {
namespace packed_gather {

using namespace gather;

template <int BITS>
struct Numbers {
  const void *scales, *zeros;
  int scale_row, scale_group, zero_row, zero_group, scale_dtype, zero_dtype;

  struct Group {
    float scale, zero;
  };

  LOWBIT_DEVICE Group at(int64_t n, int64_t group) const {
    Group found;
    found.scale = float_at(scales, DType(scale_dtype), n * scale_row + group * scale_group);
    found.zero = static_cast<float>(1 << (BITS - 1));
    if (zeros != nullptr) found.zero = float_at(zeros, DType(zero_dtype), n * zero_row + group * zero_group);
    return found;
  }

  LOWBIT_DEVICE Group missing() const { return {not_a_number(), 0.0f}; }

  LOWBIT_DEVICE float value(uint32_t code, const Group& group) const {
    return multiply(static_cast<float>(code) - group.zero, group.scale);
  }
};

// Args:
//   BITS, T: of the codes; the dtype of `out`.
//   group_factor, group_shift: the Divisor by group_size; tile_factor, tile_shift: that by the tiles of a row.
//   scale_row, scale_group, zero_row, zero_group: between the values of neighbouring rows and groups; 0: one for all.
//   vectors: the rows of `out` begin at multiples of 16 bytes.
template <int BITS, DType T>
LOWBIT_KERNEL(THREADS, 4)
kernel(const uint8_t* tiles, const void* scales, const void* zeros, const void* outlier_values,
       const void* outlier_columns, const int32_t* outlier_rows, const void* ids, void* out, int count, int N, int K,
       int group_size, uint32_t group_factor, int group_shift, uint32_t tile_factor, int tile_shift, int scale_row,
       int scale_group, int zero_row, int zero_group, int scale_dtype, int zero_dtype, int outlier_dtype,
       int wide_columns, int wide_ids, int vectors) {
  const Gathered gathered = {tiles, outlier_values, outlier_columns, outlier_rows, ids, out, count, N, K, group_size,
                             {group_factor, group_shift}, {tile_factor, tile_shift}, outlier_dtype, wide_columns,
                             wide_ids, vectors};
  const Numbers<BITS> numbers = {scales, zeros, scale_row, scale_group, zero_row, zero_group, scale_dtype, zero_dtype};
  write_rows<BITS, T>(gathered, numbers);
}

}  // namespace packed_gather
}  // namespace cuda
}  // namespace lowbit
