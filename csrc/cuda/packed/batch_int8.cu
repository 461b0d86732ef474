// Launches of packed/batch_int8.cuh: which of its instances runs a call.
#include "cuda/packed/batch_int8.cuh"

namespace lowbit {
namespace cuda {
namespace packed_batch_int8 {
namespace {

// What is where in the workspace.
struct Places {
  int8::Quantized x;
  int32_t* x_sums;
  uint32_t* parts;
  float* outlier_parts;
};

template <int BITS, int M_TILES, bool CUT>
int launch_instance(const Call& call, const Plan& plan, const Places& to, const int8::Ending& ending, Stream stream) {
  const packed::Weight& w = call.weight;
  const int64_t zero_row = w.per_tensor ? 0 : w.zeros_row;
  const int64_t blocks = (call.M + 8 * M_TILES - 1) / (8 * M_TILES) * ((w.N + ROWS - 1) / ROWS) * plan.splits;
  return lowbit::cuda::launch(
      &kernel<BITS, M_TILES, CUT>, static_cast<int>(blocks), THREADS, shared_bytes(BITS, M_TILES, plan.stages), stream,
      w.packed, w.scales, w.zeros, call.bias, w.outliers.values, w.outliers.columns, w.outliers.rows, to.x.q,
      to.x.inverse, to.x_sums, call.x, call.y, call.M, w.N, w.K, int8::columns_of(w.K), w.group_size, ending.scale_row,
      w.scales_group, zero_row, w.zeros_group, padded_rows(call.M), static_cast<int>(w.scales_dtype),
      static_cast<int>(w.zeros_dtype), static_cast<int>(call.bias_dtype), static_cast<int>(w.outliers.dtype),
      w.outliers.wide, static_cast<int>(call.dtype), ending.exact, to.parts, to.outlier_parts, plan.splits, plan.unit,
      plan.stages);
}

template <int BITS>
int launch_rows(const Call& call, const Plan& plan, const Places& to, Stream stream) {
  const packed::Weight& w = call.weight;
  if (int error = int8::launch_quantize(call.x, call.dtype, call.x_scale, to.x, call.M, w.K, stream)) return error;
  const int64_t rows = padded_rows(call.M);
  if (int error = lowbit::cuda::launch(&sum_groups<WARPS>, static_cast<int>(w.G * rows / WARPS), THREADS, THREADS * 4,
                                       stream, to.x.q, to.x_sums, call.M, w.K, int8::columns_of(w.K), w.group_size,
                                       rows))
    return error;
  const int8::Ending ending = {to.x.inverse, w.scales, call.bias, call.y, call.M, w.N, exact(w),
                               static_cast<int>(w.per_tensor ? 0 : w.scales_row), w.scales_dtype, call.bias_dtype,
                               call.dtype};
  const auto start = plan.cut            ? &launch_instance<BITS, 4, true>
                     : plan.m_tiles == 4 ? &launch_instance<BITS, 4, false>
                                         : &launch_instance<BITS, 8, false>;
  if (int error = start(call, plan, to, ending, stream)) return error;
  return int8::launch_sum(ending, to.parts, to.outlier_parts, plan.splits, stream);
}

}  // namespace

template <int BITS>
int launch(const Call& call, const Device& device, void* workspace, Stream stream) {
  const packed::Weight& w = call.weight;
  const Plan plan = plan_of(call, device);
  Places to;
  to.x = int8::quantized_at(workspace, plan.rows, w.K);
  char* const sums = static_cast<char*>(workspace) + int8::quantized_bytes(plan.rows, w.K);
  char* const parts = sums + x_sums_bytes(call, plan);
  to.x_sums = reinterpret_cast<int32_t*>(sums);
  to.parts = reinterpret_cast<uint32_t*>(parts);
  to.outlier_parts = w.outliers ? reinterpret_cast<float*>(parts + parts_bytes(call, plan)) : nullptr;
  const int64_t element = element_size(call.dtype);
  for (int64_t first = 0; first < call.M; first += plan.rows) {
    Call some = call;
    some.M = std::min(plan.rows, call.M - first);
    some.x = static_cast<const char*>(call.x) + first * w.K * element;
    some.y = static_cast<char*>(call.y) + first * w.N * element;
    if (int error = launch_rows<BITS>(some, plan, to, stream)) return error;
  }
  return 0;
}

template int launch<LOWBIT_BITS>(const Call&, const Device&, void*, Stream);

}  // namespace packed_batch_int8
}  // namespace cuda
}  // namespace lowbit
