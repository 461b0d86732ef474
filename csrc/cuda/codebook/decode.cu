// Launches of codebook/decode.cuh: which of its instances runs a call.
#include "cuda/codebook/decode.cuh"

namespace lowbit {
namespace cuda {
namespace codebook_decode {
namespace {

template <int BITS, DType T, Look LOOK, int M_TILES, bool ANY_GROUPS>
int launch_instance(const Call& call, float* parts, int splits, Stream stream) {
  const codebook::Weight& w = call.weight;
  const bool copy_x = aligned(call.x) && w.K % 8 == 0;
  const bool nested = w.scales_dtype == DType::u8;
  const int error = lowbit::cuda::launch(
      &kernel<BITS, T, LOOK, M_TILES, ANY_GROUPS>, splits * row_blocks(w.N), THREADS,
      shared_bytes(w, static_cast<int>(call.M)), stream, w.packed, w.codebook, w.scales,
      nested ? w.nested.codebook : nullptr, w.nested.absmax, w.nested.offset, call.bias, w.outliers.values,
      w.outliers.columns, w.outliers.rows, static_cast<const uint16_t*>(call.x), static_cast<uint16_t*>(call.y), call.M,
      w.N, w.K, w.group_size, group_factor(w), w.G, table_row(w), table_group(w), static_cast<int>(w.codebook_dtype),
      static_cast<int>(w.scales_dtype), static_cast<int>(call.bias_dtype), static_cast<int>(w.outliers.dtype),
      w.outliers.wide, copy_x, parts, splits);
  return error != 0 ? error : launch_sum<T>(call, parts, splits, stream);
}

template <int BITS, DType T, Look LOOK>
int launch_shape(const Call& call, float* parts, int splits, Stream stream) {
  if (any_groups(call.weight)) return launch_instance<BITS, T, LOOK, 1, true>(call, parts, splits, stream);
  return call.M <= 8 ? launch_instance<BITS, T, LOOK, 1, false>(call, parts, splits, stream)
                     : launch_instance<BITS, T, LOOK, 2, false>(call, parts, splits, stream);
}

template <int BITS, DType T>
int launch_look(const Call& call, float* parts, int splits, Stream stream) {
  if constexpr (BITS > 4) return launch_shape<BITS, T, Look::entries>(call, parts, splits, stream);
  if constexpr (BITS == 4)
    if (look_of(call.weight) == Look::pairs) return launch_shape<BITS, T, Look::pairs>(call, parts, splits, stream);
  if constexpr (BITS <= 4) return launch_shape<BITS, T, Look::registers>(call, parts, splits, stream);
}

}  // namespace

template <int BITS>
int launch(const Call& call, const Device& device, void* workspace, Stream stream) {
  float* const parts = static_cast<float*>(workspace);
  const int splits = splits_of(call.weight, device), rows = rows_at_once(call.weight, device);
  Call part = call;
  for (int64_t m = 0; m < call.M; m += rows) {
    part.M = std::min<int64_t>(rows, call.M - m);
    part.x = static_cast<const uint16_t*>(call.x) + m * call.weight.K;
    part.y = static_cast<uint16_t*>(call.y) + m * call.weight.N;
    const int error = call.dtype == DType::f16 ? launch_look<BITS, DType::f16>(part, parts, splits, stream)
                                               : launch_look<BITS, DType::bf16>(part, parts, splits, stream);
    if (error != 0) return error;
  }
  return 0;
}

template int launch<LOWBIT_BITS>(const Call&, const Device&, void*, Stream);

}  // namespace codebook_decode
}  // namespace cuda
}  // namespace lowbit
