// Launches of packed/batch_sm90.cuh: which of its instances runs a call.
#include "cuda/packed/batch_sm90.cuh"

namespace lowbit {
namespace cuda {
namespace packed_batch_sm90 {
namespace {

template <int BITS, DType T, int X_ROWS>
int launch_instance(const Call& call, const Device& device, float* parts, Stream stream) {
  const packed::Weight& w = call.weight;
  CUtensorMap parts_map = {}, octets_map = {}, x_map = {};
  const auto codes_map = [&](CUtensorMap& map, int columns, CUtensorMapSwizzle swizzle) {
    return make_map(map, CU_TENSOR_MAP_DATA_TYPE_UINT8, 1, w.packed, w.N, w.row_bytes, ROWS, columns, swizzle);
  };
  int error = BITS > 1 ? codes_map(parts_map, PART, CU_TENSOR_MAP_SWIZZLE_64B) : 0;
  if (error == 0 && BITS % 2) error = codes_map(octets_map, OCTETS, CU_TENSOR_MAP_SWIZZLE_NONE);
  if (error == 0)
    error = make_map(x_map, CU_TENSOR_MAP_DATA_TYPE_UINT16, 2, call.x, call.M, w.K, X_ROWS, BOX,
                     CU_TENSOR_MAP_SWIZZLE_128B);
  if (error != 0) return error;
  const int64_t chunks = w.group_size / CHUNK;
  const uint32_t factor = w.group_size >= w.K ? 0 : static_cast<uint32_t>(((int64_t(1) << 31) + chunks - 1) / chunks);
  const int64_t scale_row = w.per_tensor ? 0 : w.scales_row, zero_row = w.per_tensor ? 0 : w.zeros_row;
  const int splits = splits_of(call, device);
  const int64_t works = splits * ((w.N + ROWS - 1) / ROWS) * ((call.M + X_ROWS - 1) / X_ROWS);
  const int blocks = static_cast<int>(std::min<int64_t>(works, device.processors));
  error = lowbit::cuda::launch(
      &kernel<BITS, T, X_ROWS>, blocks, THREADS, SHARED_BYTES<BITS, X_ROWS>, stream, parts_map, octets_map, x_map,
      w.scales, w.zeros, call.bias, w.outliers.values, w.outliers.columns, w.outliers.rows,
      static_cast<const uint16_t*>(call.x), static_cast<uint16_t*>(call.y), call.M, w.N, w.K, factor, scale_row,
      w.scales_group, zero_row, w.zeros_group, static_cast<int>(w.scales_dtype), static_cast<int>(w.zeros_dtype),
      static_cast<int>(call.bias_dtype), static_cast<int>(w.outliers.dtype), w.outliers.wide, parts, splits);
  if (error != 0 || splits == 1) return error;
  const int sums = static_cast<int>((call.M * w.N + 255) / 256);
  return lowbit::cuda::launch(&add_splits<T>, sums, 256, 0, stream, parts, call.bias, static_cast<uint16_t*>(call.y),
                              call.M, w.N, splits, static_cast<int>(call.bias_dtype));
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

}  // namespace packed_batch_sm90
}  // namespace cuda
}  // namespace lowbit
