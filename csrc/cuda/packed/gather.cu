// Launches of packed/gather.cuh.
#include "cuda/packed/gather.cuh"

namespace lowbit {
namespace cuda {
namespace packed_gather {
namespace {

template <int BITS, DType T>
int launch_dtype(const Call& call, Stream stream) {
  const packed::Weight& w = call.weight;
  const Divisor by_group = divisor_of(w.group_size), by_tiles = divisor_of((w.K + TILE - 1) / TILE);
  return lowbit::cuda::launch(
      &kernel<BITS, T>, blocks_of<T>(call), THREADS, 0, stream, w.packed, w.scales, w.zeros, w.outliers.values,
      w.outliers.columns, w.outliers.rows, call.ids, call.out, call.count, w.N, w.K, w.group_size, by_group.factor,
      by_group.shift, by_tiles.factor, by_tiles.shift, w.per_tensor ? 0 : w.scales_row, w.scales_group,
      w.per_tensor ? 0 : w.zeros_row, w.zeros_group, static_cast<int>(w.scales_dtype), static_cast<int>(w.zeros_dtype),
      static_cast<int>(w.outliers.dtype), w.outliers.wide, call.wide, stores_vectors(call));
}

}  // namespace

template <int BITS>
int launch(const Call& call, Stream stream) {
  switch (call.dtype) {
    case DType::f32: return launch_dtype<BITS, DType::f32>(call, stream);
    case DType::f16: return launch_dtype<BITS, DType::f16>(call, stream);
    default: return launch_dtype<BITS, DType::bf16>(call, stream);
  }
}

template int launch<LOWBIT_BITS>(const Call&, Stream);

}  // namespace packed_gather
}  // namespace cuda
}  // namespace lowbit
