// Launches of packed/decode_int8.cuh: which of its instances runs a call.
#include "cuda/packed/decode_int8.cuh"

namespace lowbit {
namespace cuda {
namespace packed_decode_int8 {
namespace {

template <int BITS, int M_TILES, bool CUT>
int launch_instance(const Call& call, const int8::Quantized& x, const int8::Ending& ending, uint32_t* parts,
                    float* outlier_parts, int splits, Stream stream) {
  const packed::Weight& w = call.weight;
  const int64_t zero_row = w.per_tensor ? 0 : w.zeros_row;
  return lowbit::cuda::launch(
      &kernel<BITS, M_TILES, CUT>, splits * row_blocks(w.N), THREADS,
      shared_bytes<M_TILES>(static_cast<int>(call.M), bool(w.outliers)), stream, w.packed, w.scales, w.zeros, call.bias,
      w.outliers.values, w.outliers.columns, w.outliers.rows, x.q, x.inverse, call.x, call.y, call.M, w.N, w.K,
      int8::columns_of(w.K), w.group_size, group_factor(w), ending.scale_row, w.scales_group, zero_row, w.zeros_group,
      static_cast<int>(w.scales_dtype), static_cast<int>(w.zeros_dtype), static_cast<int>(call.bias_dtype),
      static_cast<int>(w.outliers.dtype), w.outliers.wide, static_cast<int>(call.dtype), ending.exact, parts,
      outlier_parts, splits);
}

}  // namespace

template <int BITS>
int launch(const Call& call, const Device& device, void* workspace, Stream stream) {
  const packed::Weight& w = call.weight;
  const int8::Quantized all = int8::quantized_at(workspace, call.M, w.K);
  int error = int8::launch_quantize(call.x, call.dtype, call.x_scale, all, call.M, w.K, stream);
  char* const begin = static_cast<char*>(workspace) + int8::quantized_bytes(call.M, w.K);
  uint32_t* const parts = reinterpret_cast<uint32_t*>(begin);
  float* const outlier_parts = w.outliers ? reinterpret_cast<float*>(begin + parts_bytes(call, device)) : nullptr;
  const int splits = splits_of(w, device);
  const int64_t rows = rows_at_once(call), element = element_size(call.dtype);
  for (int64_t m = 0; m < call.M && error == 0; m += rows) {
    Call part = call;
    part.M = std::min(rows, call.M - m);
    part.x = static_cast<const char*>(call.x) + m * w.K * element;
    part.y = static_cast<char*>(call.y) + m * w.N * element;
    const int8::Quantized x = {all.q + m * int8::columns_of(w.K), all.inverse + m};
    const bool exact = w.G == 1 && (w.zeros == nullptr || w.zeros_dtype == DType::u8);
    const int8::Ending ending = {x.inverse, w.scales, call.bias, part.y, part.M, w.N, exact,
                                 static_cast<int>(w.per_tensor ? 0 : w.scales_row), w.scales_dtype, call.bias_dtype,
                                 call.dtype};
    const auto start = cuts_chunks(w)  ? &launch_instance<BITS, 1, true>
                       : part.M <= 8 ? &launch_instance<BITS, 1, false>
                                     : &launch_instance<BITS, 2, false>;
    error = start(part, x, ending, parts, outlier_parts, splits, stream);
    if (error == 0) error = int8::launch_sum(ending, parts, outlier_parts, splits, stream);
  }
  return error;
}

template int launch<LOWBIT_BITS>(const Call&, const Device&, void*, Stream);

}  // namespace packed_decode_int8
}  // namespace cuda
}  // namespace lowbit
