// Launches of codebook/experts.cuh: which of its instances runs a call.
#include "cuda/codebook/experts.cuh"

#include "cuda/codebook/batch_plan.h"

namespace lowbit {
namespace cuda {
namespace codebook_experts {
namespace {

static_assert(decode::THREADS == batch::THREADS);

experts::Tiling tiling(const Call& call, const Device& device) {
  const int64_t rows = std::min<int64_t>(codebook_decode::rows_at_once(call.linear.weight, device), DECODE_ROWS);
  return experts::tiling_of(call, experts::shift_of(takes_batch(call) ? BATCH_ROWS : rows));
}

// What the kernels are given of a call.
struct Given {
  const Call& call;
  const Device& device;
  const experts::Tiling& tiling;
  const experts::Sorted& sorted;
  Stack stack;
  Stream stream;
};

Stack stack_of(const Call& call) {
  const Linear<codebook::Weight>& all = call.linear;
  const codebook::Weight& w = all.weight;
  const auto number = [](int64_t n) { return static_cast<int>(n); };
  const bool copy_x = batch::aligned(all.x) && w.K % 8 == 0;
  return {w.packed, w.codebook, w.scales, w.scales_dtype == DType::u8 ? w.nested.codebook : nullptr, w.nested.absmax,
          w.nested.offset, all.bias, w.outliers.values, w.outliers.columns, w.outliers.rows, number(w.N / call.E),
          number(w.K), number(w.group_size), number(w.G), number(codebook_stored::table_row(w)),
          number(codebook_stored::table_group(w)), static_cast<int>(w.codebook_dtype),
          static_cast<int>(w.scales_dtype), static_cast<int>(all.bias_dtype), static_cast<int>(w.outliers.dtype),
          w.outliers.wide, copy_x};
}

// Starts a kernel of rows of W a block; `more`: its last arguments.
template <class Kernel, class... More>
int launch_kernel(const Given& g, Kernel kernel, int rows, int shared, More... more) {
  const Stack& s = g.stack;
  const int64_t blocks = g.tiling.count * ((s.N + rows - 1) / rows);
  return lowbit::cuda::launch(kernel, static_cast<int>(blocks), decode::THREADS, shared, g.stream, g.sorted.tiles,
                              g.sorted.order, g.tiling.count, s.tiles, s.codebook, s.scales, s.scale_codebook,
                              s.scale_absmax, s.scale_offset, s.bias, s.outlier_values, s.outlier_columns,
                              s.outlier_rows, s.N, s.K, s.group_size, s.groups, s.table_row, s.table_group,
                              s.codebook_dtype, s.scale_dtype, s.bias_dtype, s.outlier_dtype, s.wide_columns, s.copy_x,
                              static_cast<const uint16_t*>(g.call.linear.x), static_cast<uint16_t*>(g.call.linear.y),
                              more...);
}

template <int BITS, DType T, Look LOOK, bool ANY_GROUPS>
int launch_instance(const Given& g) {
  const codebook::Weight& w = g.call.linear.weight;
  return launch_kernel(g, &decode_kernel<BITS, T, LOOK, ANY_GROUPS>, decode::ROWS,
                       codebook_decode::shared_bytes(w, 1 << g.tiling.shift), decode::group_factor(w));
}

template <int BITS, DType T, Look LOOK>
int launch_look(const Given& g) {
  return codebook_decode::any_groups(g.call.linear.weight) ? launch_instance<BITS, T, LOOK, true>(g)
                                                           : launch_instance<BITS, T, LOOK, false>(g);
}

template <int BITS, DType T>
int launch_decode(const Given& g) {
  if constexpr (BITS > 4) return launch_look<BITS, T, Look::entries>(g);
  if constexpr (BITS == 4)
    if (codebook_decode::look_of(g.call.linear.weight) == Look::pairs) return launch_look<BITS, T, Look::pairs>(g);
  if constexpr (BITS <= 4) return launch_look<BITS, T, Look::registers>(g);
}

template <int BITS, DType T, bool CUT>
int launch_batch(const Given& g, const codebook_batch::TablePlan& plan) {
  const int shared = batch::Shared<BITS, BATCH_ROWS / 8, codebook_batch::RESERVED>::bytes(
      plan.stages, plan.table_bytes(g.call.linear.weight));
  return launch_kernel(g, &batch_kernel<BITS, T, CUT>, batch::ROWS, shared, plan.stages, plan.copies, plan.gathers);
}

template <int BITS, DType T>
int launch_product(const Given& g) {
  if (!takes_batch(g.call)) return launch_decode<BITS, T>(g);
  const auto plan = codebook_batch::table_plan_of<BITS>(experts::of_one(g.call, BATCH_ROWS), g.device);
  return plan.cut ? launch_batch<BITS, T, true>(g, plan) : launch_batch<BITS, T, false>(g, plan);
}

}  // namespace

template <int BITS>
const char* declines(const Call& call, const Device& device) {
  if (const char* reason = experts::declines(call)) return reason;
  const codebook::Weight& w = call.linear.weight;
  if (call.linear.dtype == DType::f32) return "experts of codebooks take x in float16 or bfloat16";
  if (w.scales_dtype == DType::u8 && w.N / call.E * w.G % NESTED_BLOCK != 0)
    return "experts with quantized scales have a multiple of 256 scales";
  return takes_batch(call) ? codebook_batch::declines<BITS>(experts::of_one(call, BATCH_ROWS), device)
                           : codebook_decode::declines(experts::of_one(call, DECODE_ROWS), device);
}

template <int BITS>
int64_t workspace_bytes(const Call& call, const Device& device) {
  return experts::sorted_bytes(tiling(call, device), call.S);
}

template <int BITS>
int launch(const Call& call, const Device& device, void* workspace, Stream stream) {
  const experts::Tiling tiles = tiling(call, device);
  const experts::Sorted sorted = experts::sorted_in(workspace, tiles, call.S);
  const int error =
      experts::launch_sort(call.ids, call.wide, call.S, call.S / call.linear.M, call.E, tiles, sorted, stream);
  if (error != 0) return error;
  const Given given = {call, device, tiles, sorted, stack_of(call), stream};
  return call.linear.dtype == DType::f16 ? launch_product<BITS, DType::f16>(given)
                                         : launch_product<BITS, DType::bf16>(given);
}

template const char* declines<LOWBIT_BITS>(const Call&, const Device&);
template int64_t workspace_bytes<LOWBIT_BITS>(const Call&, const Device&);
template int launch<LOWBIT_BITS>(const Call&, const Device&, void*, Stream);

}  // namespace codebook_experts
}  // namespace cuda
}  // namespace lowbit
