// Launches of codebook/decode_simt.cuh: which of its instances runs a call.
#include "cuda/codebook/decode_simt.cuh"

namespace lowbit {
namespace cuda {
namespace codebook_decode_simt {
namespace {

template <int BITS, DType T>
int launch_instance(const Call& call, float* parts, int splits, Stream stream) {
  const codebook::Weight& w = call.weight;
  const int64_t group_size = std::min<int64_t>(w.group_size, w.K);
  const Divisor by_group = divisor_of(group_size);
  const bool copy_x = aligned(call.x) && w.K * sizeof(Element<T>) % 16 == 0, nested = w.scales_dtype == DType::u8;
  const int error = lowbit::cuda::launch(
      &kernel<BITS, T>, splits * row_blocks(w.N), THREADS, shared_bytes(w, T, static_cast<int>(call.M)), stream,
      w.packed, w.codebook, w.scales, nested ? w.nested.codebook : nullptr, w.nested.absmax, w.nested.offset, call.bias,
      w.outliers.values, w.outliers.columns, w.outliers.rows, static_cast<const Element<T>*>(call.x),
      static_cast<Element<T>*>(call.y), call.M, w.N, w.K, group_size, by_group.factor, by_group.shift, w.G,
      table_row(w), table_group(w), static_cast<int>(w.codebook_dtype), static_cast<int>(w.scales_dtype),
      static_cast<int>(call.bias_dtype), static_cast<int>(w.outliers.dtype), w.outliers.wide, copy_x, parts, splits);
  if (error != 0 || splits == 1) return error;
  const int blocks = static_cast<int>((call.M * w.N + THREADS - 1) / THREADS);
  return lowbit::cuda::launch(&add_splits<T>, blocks, THREADS, 0, stream, parts, call.bias,
                              static_cast<Element<T>*>(call.y), call.M, w.N, splits, static_cast<int>(call.bias_dtype));
}

template <int BITS, DType T>
int launch_rows(const Call& call, const Device& device, float* parts, Stream stream) {
  const int splits = splits_of(call.weight, device), rows = rows_at_once(call, device);
  Call part = call;
  for (int64_t m = 0; m < call.M; m += rows) {
    part.M = std::min<int64_t>(rows, call.M - m);
    part.x = static_cast<const Element<T>*>(call.x) + m * call.weight.K;
    part.y = static_cast<Element<T>*>(call.y) + m * call.weight.N;
    if (const int error = launch_instance<BITS, T>(part, parts, splits, stream)) return error;
  }
  return 0;
}

}  // namespace

template <int BITS>
int launch(const Call& call, const Device& device, void* workspace, Stream stream) {
  float* const parts = static_cast<float*>(workspace);
  if constexpr (BITS > 4) {  // smaller tables of groups are decode's
    if (call.dtype == DType::f16) return launch_rows<BITS, DType::f16>(call, device, parts, stream);
    if (call.dtype == DType::bf16) return launch_rows<BITS, DType::bf16>(call, device, parts, stream);
  }
  return launch_rows<BITS, DType::f32>(call, device, parts, stream);
}

template int launch<LOWBIT_BITS>(const Call&, const Device&, void*, Stream);

}  // namespace codebook_decode_simt
}  // namespace cuda
}  // namespace lowbit
