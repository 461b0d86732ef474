// Launches of codebook/steps.cuh.
#include "cuda/codebook/steps.cuh"

namespace lowbit {
namespace cuda {
namespace codebook_int8 {

int launch_steps(const codebook::Weight& w, float* steps, Stream stream) {
  constexpr int ROWS = THREADS / STEP_THREADS;
  const bool nested = w.scales_dtype == DType::u8;
  const int64_t tables = w.tables == codebook::Weight::Tables::group ? w.G : 1;
  return lowbit::cuda::launch(&find_steps, static_cast<int>((w.N + ROWS - 1) / ROWS), THREADS, 8 * THREADS, stream,
                              w.codebook, w.scales, nested ? w.nested.codebook : nullptr, w.nested.absmax,
                              w.nested.offset, steps, w.N, tables << w.bits, w.G, table_row(w),
                              static_cast<int>(w.codebook_dtype), static_cast<int>(w.scales_dtype));
}

int launch_sum(const Call& call, const float* inverse, const float* steps, const int32_t* parts, int splits,
               Stream stream) {
  if (splits == 1) return 0;
  const codebook::Weight& w = call.weight;
  return lowbit::cuda::launch(&add_splits, static_cast<int>((call.M * w.N + THREADS - 1) / THREADS), THREADS, 0, stream,
                              parts, inverse, steps, call.bias, w.outliers.values, w.outliers.columns, w.outliers.rows,
                              call.x, call.y, call.M, w.N, w.K, splits, static_cast<int>(call.bias_dtype),
                              static_cast<int>(w.outliers.dtype), w.outliers.wide, static_cast<int>(call.dtype));
}

}  // namespace codebook_int8
}  // namespace cuda
}  // namespace lowbit
