// Launches of packed/batch.cuh: which of its instances runs a call.
#include "cuda/packed/batch.cuh"

namespace lowbit {
namespace cuda {
namespace packed_batch {
namespace {

bool has_residuals(const packed::Weight& w) { return w.zeros != nullptr && w.zeros_dtype != DType::u8; }

int64_t x_sums_bytes(const Call& call, int64_t rows) {
  return has_residuals(call.weight) ? call.weight.G * padded_rows(static_cast<int>(rows)) * 4 : 0;
}

template <int BITS, DType T, int M_TILES, bool CUT>
int launch_instance(const Call& call, const Plan& plan, const float* x_sums, float* parts, Stream stream) {
  const packed::Weight& w = call.weight;
  const int64_t scale_row = w.per_tensor ? 0 : w.scales_row, zero_row = w.per_tensor ? 0 : w.zeros_row;
  const int64_t x_tiles = (call.M + 8 * M_TILES - 1) / (8 * M_TILES), blocks = x_tiles * ((w.N + ROWS - 1) / ROWS);
  const bool copy_x = aligned(call.x) && w.K % 8 == 0;
  return lowbit::cuda::launch(
      &kernel<BITS, T, M_TILES, CUT>, static_cast<int>(blocks * plan.splits), THREADS,
      Shared<BITS, M_TILES, RESERVED>::bytes(plan.stages), stream, w.packed, w.scales, w.zeros, call.bias, w.outliers.values,
      w.outliers.columns, w.outliers.rows, static_cast<const uint16_t*>(call.x), x_sums,
      static_cast<uint16_t*>(call.y), parts, call.M, w.N, w.K, w.group_size, scale_row, w.scales_group, zero_row,
      w.zeros_group, static_cast<int>(w.scales_dtype), static_cast<int>(w.zeros_dtype),
      static_cast<int>(call.bias_dtype), static_cast<int>(w.outliers.dtype), w.outliers.wide, copy_x, plan.splits,
      plan.stages);
}

template <int BITS, DType T>
int launch_rows(const Call& call, const Plan& plan, void* workspace, Stream stream) {
  const packed::Weight& w = call.weight;
  const int M = static_cast<int>(call.M);
  float* x_sums = nullptr;
  float* const parts = static_cast<float*>(workspace) + x_sums_bytes(call, plan.rows) / 4;
  int error = 0;
  if (has_residuals(w)) {
    x_sums = static_cast<float*>(workspace);
    error = lowbit::cuda::launch(&sum_groups<T>, static_cast<int>(w.G * padded_rows(M) / WARPS), THREADS, THREADS * 4,
                                 stream, static_cast<const uint16_t*>(call.x), x_sums, M, w.K, w.group_size);
    if (error != 0) return error;
  }
  if (plan.cut)
    error = launch_instance<BITS, T, 4, true>(call, plan, x_sums, parts, stream);
  else if (plan.m_tiles == MOST_TILES<BITS>)
    error = launch_instance<BITS, T, MOST_TILES<BITS>, false>(call, plan, x_sums, parts, stream);
  else
    error = launch_instance<BITS, T, 4, false>(call, plan, x_sums, parts, stream);
  if (error != 0 || plan.splits == 1) return error;
  return lowbit::cuda::launch(&add_splits<T>, static_cast<int>((call.M * w.N + THREADS - 1) / THREADS), THREADS, 0,
                              stream, parts, call.bias, static_cast<uint16_t*>(call.y), M, w.N, plan.splits,
                              static_cast<int>(call.bias_dtype));
}

}  // namespace

// The sums of x, then the splits.
template <int BITS>
int64_t workspace_bytes(const Call& call, const Device& device) {
  const Plan plan = plan_of<BITS, RESERVED>(call, device);
  return x_sums_bytes(call, plan.rows) + parts_bytes(call, plan);
}

template <int BITS>
int launch(const Call& call, const Device& device, void* workspace, Stream stream) {
  const Plan plan = plan_of<BITS, RESERVED>(call, device);
  for (int64_t first = 0; first < call.M; first += plan.rows) {
    Call some = call;
    some.M = std::min(plan.rows, call.M - first);
    some.x = static_cast<const uint16_t*>(call.x) + first * call.weight.K;
    some.y = static_cast<uint16_t*>(call.y) + first * call.weight.N;
    const int error = call.dtype == DType::f16 ? launch_rows<BITS, DType::f16>(some, plan, workspace, stream)
                                               : launch_rows<BITS, DType::bf16>(some, plan, workspace, stream);
    if (error != 0) return error;
  }
  return 0;
}

template int64_t workspace_bytes<LOWBIT_BITS>(const Call&, const Device&);
template int launch<LOWBIT_BITS>(const Call&, const Device&, void*, Stream);

}  // namespace packed_batch
}  // namespace cuda
}  // namespace lowbit
