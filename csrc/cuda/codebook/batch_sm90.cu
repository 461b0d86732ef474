// Launches of codebook/batch_sm90.cuh: which of its instances runs a call.
#include "cuda/codebook/batch_sm90.cuh"

namespace lowbit {
namespace cuda {
namespace codebook_batch_sm90 {
namespace {

template <int BITS, DType T, int X_ROWS>
int launch_instance(const Call& call, const Device& device, float* parts, Stream stream) {
  const codebook::Weight& w = call.weight;
  CUtensorMap parts_map = {}, octets_map = {}, x_map = {};
  int error = make_maps<BITS, X_ROWS>(parts_map, octets_map, x_map, w, call.x, call.M);
  if (error != 0) return error;
  const int splits = splits_of(call, device);
  const int64_t works = splits * ((w.N + ROWS - 1) / ROWS) * ((call.M + X_ROWS - 1) / X_ROWS);
  const int blocks = static_cast<int>(std::min<int64_t>(works, device.processors));
  const bool nested = w.scales_dtype == DType::u8;
  error = lowbit::cuda::launch(
      &kernel<BITS, T, X_ROWS>, blocks, THREADS, SHARED_BYTES<BITS, X_ROWS, TABLE_BYTES<BITS, X_ROWS>>, stream,
      parts_map, octets_map, x_map, w.codebook, w.scales, nested ? w.nested.codebook : nullptr, w.nested.absmax,
      w.nested.offset, call.bias, w.outliers.values, w.outliers.columns, w.outliers.rows,
      static_cast<const uint16_t*>(call.x), static_cast<uint16_t*>(call.y), call.M, w.N, w.K, group_factor(w), w.G,
      table_row(w), static_cast<int>(w.codebook_dtype), static_cast<int>(w.scales_dtype),
      static_cast<int>(call.bias_dtype), static_cast<int>(w.outliers.dtype), w.outliers.wide, parts, splits);
  return error != 0 ? error : launch_sum<T>(call, parts, splits, stream);
}

template <int BITS, DType T>
int launch_shape(const Call& call, const Device& device, float* parts, Stream stream) {
  return x_rows_of(call) == 64 ? launch_instance<BITS, T, 64>(call, device, parts, stream)
                               : launch_instance<BITS, T, 128>(call, device, parts, stream);
}

}  // namespace

template <int BITS>
int launch(const Call& call, const Device& device, void* workspace, Stream stream) {
  float* const parts = static_cast<float*>(workspace);
  return call.dtype == DType::f16 ? launch_shape<BITS, DType::f16>(call, device, parts, stream)
                                  : launch_shape<BITS, DType::bf16>(call, device, parts, stream);
}

template int launch<LOWBIT_BITS>(const Call&, const Device&, void*, Stream);

}  // namespace codebook_batch_sm90
}  // namespace cuda
}  // namespace lowbit
