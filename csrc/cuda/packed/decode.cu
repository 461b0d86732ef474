// Launches of packed/decode.cuh: which of its instances runs a call.
#include "cuda/packed/decode.cuh"

namespace lowbit {
namespace cuda {
namespace packed_decode {
namespace {

template <int BITS, DType T, int M_TILES, bool CUT>
int launch_instance(const Call& call, float* parts, int splits, Stream stream) {
  const packed::Weight& w = call.weight;
  const bool one_group = w.group_size >= w.K;
  const int64_t chunks = w.group_size / CHUNK;
  const uint32_t factor = CUT || one_group ? 0 : static_cast<uint32_t>(((int64_t(1) << 31) + chunks - 1) / chunks);
  const int64_t scale_row = w.per_tensor ? 0 : w.scales_row, zero_row = w.per_tensor ? 0 : w.zeros_row;
  const int blocks = splits * row_blocks(w.N);
  const bool copy_x = aligned(call.x) && w.K * element_size(T) % 16 == 0;
  const int shared = shared_bytes<T, M_TILES>(static_cast<int>(call.M));
  const int error = lowbit::cuda::launch(
      &kernel<BITS, T, M_TILES, CUT>, blocks, THREADS, shared, stream, w.packed, w.scales, w.zeros, call.bias,
      w.outliers.values, w.outliers.columns, w.outliers.rows, static_cast<const Element<T>*>(call.x),
      static_cast<Element<T>*>(call.y), call.M, w.N, w.K, w.group_size, factor, scale_row, w.scales_group, zero_row,
      w.zeros_group, static_cast<int>(w.scales_dtype), static_cast<int>(w.zeros_dtype),
      static_cast<int>(call.bias_dtype), static_cast<int>(w.outliers.dtype), w.outliers.wide, copy_x, parts, splits);
  if (error != 0 || splits == 1) return error;
  const int sums = static_cast<int>((call.M * w.N + THREADS - 1) / THREADS);
  return lowbit::cuda::launch(&add_splits<T>, sums, THREADS, 0, stream, parts, call.bias,
                              static_cast<Element<T>*>(call.y), call.M, w.N, splits, static_cast<int>(call.bias_dtype));
}

template <int BITS, DType T>
int launch_shape(const Call& call, float* parts, int splits, Stream stream) {
  const packed::Weight& w = call.weight;
  const bool cut = w.group_size < w.K && w.group_size % CHUNK != 0;
  if (call.M <= 8)
    return cut ? launch_instance<BITS, T, 1, true>(call, parts, splits, stream)
               : launch_instance<BITS, T, 1, false>(call, parts, splits, stream);
  return cut ? launch_instance<BITS, T, 2, true>(call, parts, splits, stream)
             : launch_instance<BITS, T, 2, false>(call, parts, splits, stream);
}

// float32 x takes three times the room: 8 rows at a time.
template <int BITS>
int launch_float32(Call call, float* parts, int splits, Stream stream) {
  const packed::Weight& w = call.weight;
  const bool cut = w.group_size < w.K && w.group_size % CHUNK != 0;
  int error = 0;
  for (int64_t left = call.M; left > 0 && error == 0; left -= 8) {
    call.M = std::min<int64_t>(left, 8);
    error = cut ? launch_instance<BITS, DType::f32, 1, true>(call, parts, splits, stream)
                : launch_instance<BITS, DType::f32, 1, false>(call, parts, splits, stream);
    call.x = static_cast<const float*>(call.x) + 8 * w.K;
    call.y = static_cast<float*>(call.y) + 8 * w.N;
  }
  return error;
}

}  // namespace

template <int BITS>
int launch(const Call& call, const Device& device, void* workspace, Stream stream) {
  float* const parts = static_cast<float*>(workspace);
  const int splits = splits_of(call, device);
  if (call.dtype == DType::f32) return launch_float32<BITS>(call, parts, splits, stream);
  return call.dtype == DType::f16 ? launch_shape<BITS, DType::f16>(call, parts, splits, stream)
                                  : launch_shape<BITS, DType::bf16>(call, parts, splits, stream);
}

template int launch<LOWBIT_BITS>(const Call&, const Device&, void*, Stream);

}  // namespace packed_decode
}  // namespace cuda
}  // namespace lowbit
