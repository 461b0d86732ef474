// Launches of quantize.cuh.
#include "cuda/quantize.cuh"

namespace lowbit {
namespace cuda {
namespace int8 {
namespace {

template <DType T>
int launch_rows(const void* x, const float* x_scale, const Quantized& to, int64_t M, int64_t K, Stream stream) {
  return launch(&quantize_rows<T>, static_cast<int>(M), THREADS, 4 * (THREADS + 16), stream,
                static_cast<const Element<T>*>(x), x_scale, to.q, to.inverse, K, columns_of(K));
}

}  // namespace

int launch_quantize(const void* x, DType dtype, const float* x_scale, const Quantized& to, int64_t M, int64_t K,
                    void* stream) {
  const auto start = dtype == DType::f32   ? &launch_rows<DType::f32>
                     : dtype == DType::f16 ? &launch_rows<DType::f16>
                                           : &launch_rows<DType::bf16>;
  return start(x, x_scale, to, M, K, static_cast<Stream>(stream));
}

int launch_sum(const Ending& e, const uint32_t* parts, const float* outlier_parts, int splits, void* stream) {
  if (splits == 1) return 0;
  const int64_t count = e.M * e.N;
  return launch(e.exact ? &add_splits<1> : &add_splits<0>, static_cast<int>((count + THREADS - 1) / THREADS), THREADS,
                0, static_cast<Stream>(stream), parts, outlier_parts, e.inverse, e.scales, e.bias, e.y, count, e.N,
                splits, e.scale_row, static_cast<int>(e.scale_dtype), static_cast<int>(e.bias_dtype),
                static_cast<int>(e.dtype));
}

}  // namespace int8
}  // namespace cuda
}  // namespace lowbit
