// Launches of codebook/batch.cuh: which of its instances runs a call.
#include "cuda/codebook/batch.cuh"
#include "cuda/codebook/batch_plan.h"

namespace lowbit {
namespace cuda {
namespace codebook_batch {
namespace {

template <int BITS, DType T, int M_TILES, bool CUT>
int launch_instance(const Call& call, const TablePlan& plan, float* parts, Stream stream) {
  const codebook::Weight& w = call.weight;
  const int64_t x_tiles = (call.M + 8 * M_TILES - 1) / (8 * M_TILES), blocks = x_tiles * ((w.N + ROWS - 1) / ROWS);
  const bool copy_x = aligned(call.x) && w.K % 8 == 0;
  return lowbit::cuda::launch(
      &kernel<BITS, T, M_TILES, CUT>, static_cast<int>(blocks * plan.splits), THREADS,
      Shared<BITS, M_TILES, RESERVED>::bytes(plan.stages, plan.table_bytes(w)), stream, w.packed, w.codebook,
      w.scales, w.nested.codebook, w.nested.absmax, w.nested.offset, call.bias, w.outliers.values, w.outliers.columns,
      w.outliers.rows, static_cast<const uint16_t*>(call.x), static_cast<uint16_t*>(call.y), parts, call.M, w.N, w.K,
      w.group_size, w.G, table_row(w), table_group(w), static_cast<int>(w.codebook_dtype),
      static_cast<int>(w.scales_dtype), static_cast<int>(call.bias_dtype), static_cast<int>(w.outliers.dtype),
      w.outliers.wide, copy_x, plan.splits, plan.stages, plan.copies, plan.gathers);
}

template <int BITS, DType T>
int launch_rows(const Call& call, const TablePlan& plan, float* parts, Stream stream) {
  int error = 0;
  if (plan.cut)
    error = launch_instance<BITS, T, 4, true>(call, plan, parts, stream);
  else if (plan.m_tiles == MOST_TILES<BITS>)
    error = launch_instance<BITS, T, MOST_TILES<BITS>, false>(call, plan, parts, stream);
  else
    error = launch_instance<BITS, T, 4, false>(call, plan, parts, stream);
  if (error != 0 || plan.splits == 1) return error;
  return lowbit::cuda::launch(&add_splits<T>, static_cast<int>((call.M * call.weight.N + THREADS - 1) / THREADS),
                              THREADS, 0, stream, parts, call.bias, static_cast<uint16_t*>(call.y), call.M,
                              call.weight.N, plan.splits, static_cast<int>(call.bias_dtype));
}

}  // namespace

template <int BITS>
const char* declines(const Call& call, const Device& device) {
  if (const char* reason = batch::declines(call)) return reason;
  if (table_plan_of<BITS>(call, device).stages == 0) return "batch has no room for x in shared memory";
  return nullptr;
}

template <int BITS>
int64_t workspace_bytes(const Call& call, const Device& device) {
  return parts_bytes(call, table_plan_of<BITS>(call, device));
}

template <int BITS>
int launch(const Call& call, const Device& device, void* workspace, Stream stream) {
  const TablePlan plan = table_plan_of<BITS>(call, device);
  for (int64_t first = 0; first < call.M; first += plan.rows) {
    Call some = call;
    some.M = std::min(plan.rows, call.M - first);
    some.x = static_cast<const uint16_t*>(call.x) + first * call.weight.K;
    some.y = static_cast<uint16_t*>(call.y) + first * call.weight.N;
    float* const parts = static_cast<float*>(workspace);
    const int error = call.dtype == DType::f16 ? launch_rows<BITS, DType::f16>(some, plan, parts, stream)
                                               : launch_rows<BITS, DType::bf16>(some, plan, parts, stream);
    if (error != 0) return error;
  }
  return 0;
}

template const char* declines<LOWBIT_BITS>(const Call&, const Device&);
template int64_t workspace_bytes<LOWBIT_BITS>(const Call&, const Device&);
template int launch<LOWBIT_BITS>(const Call&, const Device&, void*, Stream);

}  // namespace codebook_batch
}  // namespace cuda
}  // namespace lowbit
