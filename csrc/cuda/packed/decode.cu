// Launches of packed/decode.cuh: which of its instances runs a call.
#include "cuda/packed/decode.cuh"

namespace lowbit {
namespace cuda {
namespace packed_decode {
namespace {

template <int BITS, DType T, int M_TILES, bool CUT>
int launch_instance(const Call& call, float* parts, int splits, Stream stream) {
  const packed::Weight& w = call.weight;
  const int64_t scale_row = w.per_tensor ? 0 : w.scales_row, zero_row = w.per_tensor ? 0 : w.zeros_row;
  const bool copy_x = aligned(call.x) && w.K * element_size(T) % 16 == 0;
  const int shift = shift_of(w);
  const int error = lowbit::cuda::launch(
      &kernel<BITS, T, M_TILES, CUT>, splits * row_blocks(w.N), THREADS,
      shared_bytes<T, M_TILES>(static_cast<int>(call.M), shift, has_residuals(w)), stream, w.packed, w.scales, w.zeros,
      call.bias, w.outliers.values, w.outliers.columns, w.outliers.rows, static_cast<const Element<T>*>(call.x),
      static_cast<Element<T>*>(call.y), call.M, w.N, w.K, w.G, w.group_size, group_factor(w), shift, entries(w),
      scale_row, w.scales_group, zero_row, w.zeros_group, static_cast<int>(w.scales_dtype),
      static_cast<int>(w.zeros_dtype), static_cast<int>(call.bias_dtype), static_cast<int>(w.outliers.dtype),
      w.outliers.wide, copy_x, parts, splits);
  return error != 0 ? error : launch_sum<T>(call, parts, splits, stream);
}

template <int BITS, DType T>
int launch_shape(const Call& call, float* parts, int splits, Stream stream) {
  if (cuts_chunks(call.weight)) return launch_instance<BITS, T, 1, true>(call, parts, splits, stream);
  if constexpr (T != DType::f32)
    if (call.M > 8) return launch_instance<BITS, T, 2, false>(call, parts, splits, stream);
  return launch_instance<BITS, T, 1, false>(call, parts, splits, stream);
}

template <int BITS, DType T>
int launch_rows(Call call, const Device& device, float* parts, int splits, Stream stream) {
  const int64_t rows = rows_at_once<T>(call.weight, device);
  int error = 0;
  for (int64_t left = call.M; left > 0 && error == 0; left -= rows) {
    call.M = std::min(left, rows);
    error = launch_shape<BITS, T>(call, parts, splits, stream);
    call.x = static_cast<const Element<T>*>(call.x) + rows * call.weight.K;
    call.y = static_cast<Element<T>*>(call.y) + rows * call.weight.N;
  }
  return error;
}

}  // namespace

template <int BITS>
int launch(const Call& call, const Device& device, void* workspace, Stream stream) {
  float* const parts = static_cast<float*>(workspace);
  const int splits = splits_of(call.weight, device);
  if (call.dtype == DType::f32) return launch_rows<BITS, DType::f32>(call, device, parts, splits, stream);
  return call.dtype == DType::f16 ? launch_rows<BITS, DType::f16>(call, device, parts, splits, stream)
                                  : launch_rows<BITS, DType::bf16>(call, device, parts, splits, stream);
}

template int launch<LOWBIT_BITS>(const Call&, const Device&, void*, Stream);

}  // namespace packed_decode
}  // namespace cuda
}  // namespace lowbit
