// Launches of codebook/gather.cuh.
#include "cuda/codebook/gather.cuh"

namespace lowbit {
namespace cuda {
namespace codebook_gather {
namespace {

template <int BITS, DType T>
int launch_dtype(const Call& call, Stream stream) {
  const codebook::Weight& w = call.weight;
  const Divisor by_group = divisor_of(w.group_size), by_tiles = divisor_of((w.K + TILE - 1) / TILE);
  const bool nested = w.scales_dtype == DType::u8;
  return lowbit::cuda::launch(
      &kernel<BITS, T>, blocks_of<T>(call), THREADS, 0, stream, w.packed, w.codebook, w.scales,
      nested ? w.nested.codebook : nullptr, w.nested.absmax, w.nested.offset, w.outliers.values, w.outliers.columns,
      w.outliers.rows, call.ids, call.out, call.count, w.N, w.K, w.group_size, by_group.factor, by_group.shift,
      by_tiles.factor, by_tiles.shift, w.G, table_row(w), table_group(w), static_cast<int>(w.codebook_dtype),
      static_cast<int>(w.scales_dtype), static_cast<int>(w.outliers.dtype), w.outliers.wide, call.wide,
      stores_vectors(call));
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

}  // namespace codebook_gather
}  // namespace cuda
}  // namespace lowbit
