// Launches of packed/experts.cuh: which of its instances runs a call.
#include "cuda/packed/experts.cuh"

namespace lowbit {
namespace cuda {
namespace packed_experts {
namespace {

// Rows of x of a tile. Decode takes as many as shared memory has room for.
int64_t tile_rows(const Call& call, const Device& device) {
  if (takes_batch(call)) return BATCH_ROWS;
  const packed::Weight& w = call.linear.weight;
  const int64_t rows = call.linear.dtype == DType::f32 ? packed_decode::rows_at_once<DType::f32>(w, device)
                                                       : packed_decode::rows_at_once<DType::f16>(w, device);
  return std::min<int64_t>(rows, DECODE_ROWS);
}

experts::Tiling tiling(const Call& call, const Device& device) {
  return experts::tiling_of(call, experts::shift_of(tile_rows(call, device)));
}

int64_t x_sums_bytes(const Call& call) {
  const packed::Weight& w = call.linear.weight;
  if (!takes_batch(call) || !packed_decode::has_residuals(w)) return 0;
  return w.G * packed_batch::padded_rows(static_cast<int>(call.linear.M)) * 4;
}

// What both kernels are given of a stack.
struct Values {
  int64_t scale_row, zero_row;
  bool copy_x;
};

Values values_of(const Call& call) {
  const packed::Weight& w = call.linear.weight;
  return {w.per_tensor ? 0 : w.scales_row, w.per_tensor ? 0 : w.zeros_row,
          batch::aligned(call.linear.x) && w.K * element_size(call.linear.dtype) % 16 == 0};
}

template <int BITS, DType T, bool CUT>
int launch_decode(const Call& call, const experts::Tiling& tiling, const experts::Sorted& sorted, Stream stream) {
  const Linear<packed::Weight>& all = call.linear;
  const packed::Weight& w = all.weight;
  const int64_t N = w.N / call.E;
  const Values v = values_of(call);
  const int shift = packed_decode::shift_of(w);
  return lowbit::cuda::launch(
      &decode_kernel<BITS, T, CUT>, static_cast<int>(tiling.count * decode::row_blocks(N)), decode::THREADS,
      packed_decode::shared_bytes<T, 1>(1 << tiling.shift, shift, packed_decode::has_residuals(w)), stream,
      sorted.tiles, sorted.order, tiling.count, w.packed, w.scales, w.zeros, all.bias, w.outliers.values,
      w.outliers.columns, w.outliers.rows, static_cast<const Element<T>*>(all.x), static_cast<Element<T>*>(all.y), N,
      w.K, w.G, w.group_size, decode::group_factor(w), shift, packed_decode::entries(w), v.scale_row, w.scales_group,
      v.zero_row, w.zeros_group, static_cast<int>(w.scales_dtype), static_cast<int>(w.zeros_dtype),
      static_cast<int>(all.bias_dtype), static_cast<int>(w.outliers.dtype), w.outliers.wide, v.copy_x);
}

template <int BITS, DType T, bool CUT>
int launch_batch(const Call& call, const Device& device, const experts::Tiling& tiling, const experts::Sorted& sorted,
                 Stream stream) {
  const Linear<packed::Weight>& all = call.linear;
  const packed::Weight& w = all.weight;
  const int M = static_cast<int>(all.M);
  const int64_t N = w.N / call.E;
  const Values v = values_of(call);
  float* const x_sums = packed_decode::has_residuals(w) ? sorted.more : nullptr;
  if (x_sums != nullptr) {
    const int blocks = static_cast<int>(w.G * packed_batch::padded_rows(M) / batch::WARPS);
    const int error =
        lowbit::cuda::launch(&packed_batch::sum_groups<T>, blocks, batch::THREADS, batch::THREADS * 4, stream,
                             static_cast<const uint16_t*>(all.x), x_sums, M, w.K, w.group_size);
    if (error != 0) return error;
  }
  const int stages =
      batch::plan_of<BITS, packed_batch::RESERVED>(experts::of_one(call, BATCH_ROWS), device).stages;
  return lowbit::cuda::launch(
      &batch_kernel<BITS, T, CUT>, static_cast<int>(tiling.count * ((N + batch::ROWS - 1) / batch::ROWS)),
      batch::THREADS, batch::Shared<BITS, BATCH_ROWS / 8, packed_batch::RESERVED>::bytes(stages), stream, sorted.tiles,
      sorted.order, tiling.count, w.packed, w.scales, w.zeros, all.bias, w.outliers.values, w.outliers.columns,
      w.outliers.rows, static_cast<const uint16_t*>(all.x), x_sums, static_cast<uint16_t*>(all.y), M, N, w.K,
      w.group_size, v.scale_row, w.scales_group, v.zero_row, w.zeros_group, static_cast<int>(w.scales_dtype),
      static_cast<int>(w.zeros_dtype), static_cast<int>(all.bias_dtype), static_cast<int>(w.outliers.dtype),
      w.outliers.wide, v.copy_x, stages);
}

template <int BITS, DType T>
int launch_product(const Call& call, const Device& device, const experts::Tiling& tiling,
                   const experts::Sorted& sorted, Stream stream) {
  const bool cut = decode::cuts_chunks(call.linear.weight);
  if constexpr (T != DType::f32)
    if (takes_batch(call))
      return cut ? launch_batch<BITS, T, true>(call, device, tiling, sorted, stream)
                 : launch_batch<BITS, T, false>(call, device, tiling, sorted, stream);
  return cut ? launch_decode<BITS, T, true>(call, tiling, sorted, stream)
             : launch_decode<BITS, T, false>(call, tiling, sorted, stream);
}

}  // namespace

// The tiles and the order of rows, then the sums of x.
template <int BITS>
int64_t workspace_bytes(const Call& call, const Device& device) {
  return experts::sorted_bytes(tiling(call, device), call.S) + x_sums_bytes(call);
}

template <int BITS>
int launch(const Call& call, const Device& device, void* workspace, Stream stream) {
  const experts::Tiling tiles = tiling(call, device);
  const experts::Sorted sorted = experts::sorted_in(workspace, tiles, call.S);
  const int error =
      experts::launch_sort(call.ids, call.wide, call.S, call.S / call.linear.M, call.E, tiles, sorted, stream);
  if (error != 0) return error;
  const auto start = call.linear.dtype == DType::f32   ? &launch_product<BITS, DType::f32>
                     : call.linear.dtype == DType::f16 ? &launch_product<BITS, DType::f16>
                                                       : &launch_product<BITS, DType::bf16>;
  return start(call, device, tiles, sorted, stream);
}

template int64_t workspace_bytes<LOWBIT_BITS>(const Call&, const Device&);
template int launch<LOWBIT_BITS>(const Call&, const Device&, void*, Stream);

}  // namespace packed_experts
}  // namespace cuda
}  // namespace lowbit
