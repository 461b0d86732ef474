// Launches of codebook/linear_int8.cuh: which of its instances runs a call.
#include "cuda/codebook/linear_int8.cuh"

namespace lowbit {
namespace cuda {
namespace codebook_linear_int8 {
namespace {

template <int BITS, int M_TILES, bool TABLED>
int launch_instance(const Call& call, const int8::Quantized& x, const float* steps, int32_t* parts, int splits,
                    Stream stream) {
  const codebook::Weight& w = call.weight;
  const int64_t group_size = std::min<int64_t>(w.group_size, w.K);
  const Divisor by_group = divisor_of(group_size);
  const bool nested = w.scales_dtype == DType::u8;
  const int64_t x_tiles = (call.M + 8 * M_TILES - 1) / (8 * M_TILES);
  const bool one_table = table_row(w) == 0 && (!TABLED || w.scales == nullptr);
  return lowbit::cuda::launch(
      &kernel<BITS, M_TILES, TABLED>, static_cast<int>(x_tiles * splits * row_blocks(w.N)), THREADS,
      shared_bytes(w, 8 * M_TILES), stream, w.packed, w.codebook, w.scales, nested ? w.nested.codebook : nullptr,
      w.nested.absmax, w.nested.offset, call.bias, w.outliers.values, w.outliers.columns, w.outliers.rows, x.q,
      x.inverse, steps, call.x, call.y, parts, call.M, w.N, w.K, int8::columns_of(w.K), group_size, by_group.factor,
      by_group.shift, w.G, table_row(w), table_group(w), one_table, static_cast<int>(w.codebook_dtype),
      static_cast<int>(w.scales_dtype), static_cast<int>(call.bias_dtype), static_cast<int>(w.outliers.dtype),
      w.outliers.wide, static_cast<int>(call.dtype), splits);
}

}  // namespace

template <int BITS>
int launch(const Call& call, const Device& device, void* workspace, Stream stream) {
  const codebook::Weight& w = call.weight;
  const int8::Quantized all = int8::quantized_at(workspace, call.M, w.K);
  char* const begin = static_cast<char*>(workspace) + int8::quantized_bytes(call.M, w.K);
  float* const steps = reinterpret_cast<float*>(begin);
  int32_t* const parts = reinterpret_cast<int32_t*>(begin + steps_bytes(call));
  int error = int8::launch_quantize(call.x, call.dtype, call.x_scale, all, call.M, w.K, stream);
  if (error == 0) error = codebook_int8::launch_steps(w, steps, stream);
  const int splits = splits_of(call, device);
  const int64_t rows = rows_at_once(call, splits), element = element_size(call.dtype);
  const bool few = x_rows_of(call) == 8;
  for (int64_t m = 0; m < call.M && error == 0; m += rows) {
    Call some = call;
    some.M = std::min(rows, call.M - m);
    some.x = static_cast<const char*>(call.x) + m * w.K * element;
    some.y = static_cast<char*>(call.y) + m * w.N * element;
    const int8::Quantized x = {all.q + m * int8::columns_of(w.K), all.inverse + m};
    const auto start = w.G == 1 ? (few ? &launch_instance<BITS, 1, true> : &launch_instance<BITS, 4, true>)
                                : (few ? &launch_instance<BITS, 1, false> : &launch_instance<BITS, 4, false>);
    error = start(some, x, steps, parts, splits, stream);
    if (error == 0) error = codebook_int8::launch_sum(some, x.inverse, steps, parts, splits, stream);
  }
  return error;
}

template int launch<LOWBIT_BITS>(const Call&, const Device&, void*, Stream);

}  // namespace codebook_linear_int8
}  // namespace cuda
}  // namespace lowbit
