// Launches of packed/decode.cuh: which of its instances runs a call.
#include "cuda/packed/decode.h"

#include <algorithm>
#include <utility>

#include "cuda/packed/decode.cuh"

// The widths that are compiled. Tests of one planted bug need one.
#ifndef LOWBIT_CUDA_BITS
#define LOWBIT_CUDA_BITS 1, 2, 3, 4, 5, 6, 7, 8
#endif

namespace lowbit {
namespace cuda {
namespace decode {
namespace {

using Call = Linear<packed::Weight>;

constexpr int64_t MOST_ROWS = 16, MOST_COLUMNS = int64_t(1) << 20, MOST_VALUES = int64_t(1) << 31,
                  MOST_SPLITS = 16;

bool one_of(int64_t bits, std::integer_sequence<int>) { return bits < 0; }

template <int FIRST, int... REST>
bool one_of(int64_t bits, std::integer_sequence<int, FIRST, REST...>) {
  return bits == FIRST || one_of(bits, std::integer_sequence<int, REST...>());
}

using Widths = std::integer_sequence<int, LOWBIT_CUDA_BITS>;

int row_blocks(int64_t N) { return static_cast<int>((N + ROWS - 1) / ROWS); }

// Blocks for all processors, and two slices of K at least for each block. M has no say.
int splits_for(const Call& call, int processors) {
  const int64_t slices = (call.weight.K + SLICE - 1) / SLICE;
  const int64_t wanted = processors / std::max(1, row_blocks(call.weight.N));
  return static_cast<int>(std::max<int64_t>(1, std::min({wanted, slices / 2, MOST_SPLITS})));
}

bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

template <int BITS, DType T, int M_TILES, bool CUT>
int launch_instance(const Call& call, float* parts, int splits, Stream stream) {
  const packed::Weight& w = call.weight;
  const bool one_group = w.group_size >= w.K;
  const int64_t chunks = w.group_size / CHUNK;
  const uint32_t factor = CUT || one_group ? 0 : static_cast<uint32_t>(((int64_t(1) << 31) + chunks - 1) / chunks);
  const int64_t scale_row = w.per_tensor ? 0 : w.scales_row, zero_row = w.per_tensor ? 0 : w.zeros_row;
  const int blocks = splits * row_blocks(w.N);
  const bool copy_x = aligned(call.x) && w.K % 8 == 0;
  const int shared = shared_bytes<M_TILES>(static_cast<int>(call.M));
  const int error = launch(
      &kernel<BITS, T, M_TILES, CUT>, blocks, THREADS, shared, stream, w.packed, w.scales, w.zeros, call.bias,
      w.outliers.values, w.outliers.columns, w.outliers.rows, static_cast<const uint16_t*>(call.x),
      static_cast<uint16_t*>(call.y), call.M, w.N, w.K, w.group_size, factor, scale_row, w.scales_group, zero_row,
      w.zeros_group, static_cast<int>(w.scales_dtype), static_cast<int>(w.zeros_dtype),
      static_cast<int>(call.bias_dtype), static_cast<int>(w.outliers.dtype), w.outliers.wide, copy_x, parts, splits);
  if (error != 0 || splits == 1) return error;
  const int sums = static_cast<int>((call.M * w.N + THREADS - 1) / THREADS);
  return launch(&add_splits<T>, sums, THREADS, 0, stream, parts, call.bias, static_cast<uint16_t*>(call.y), call.M, w.N,
                splits, static_cast<int>(call.bias_dtype));
}

template <int BITS, DType T>
int launch_shape(const Call& call, float* parts, int splits, Stream stream) {
  const packed::Weight& w = call.weight;
  const bool cut = w.group_size < w.K && w.group_size % CHUNK != 0;
  if (call.M <= 8)
    return cut ? launch_instance<BITS, T, 1, true>(call, parts, splits, stream)
               : launch_instance<BITS, T, 1, false>(call, parts, splits, stream);
  return cut ? launch_instance<BITS, T, 2, true>(call, parts, splits, stream)
             : launch_instance<BITS, T, 2, false>(call, parts, splits, stream);
}

template <int... BITS>
int launch_width(const Call& call, float* parts, int splits, Stream stream, std::integer_sequence<int, BITS...>) {
  int result = -1;
  auto one = [&](auto bits) {
    if (call.weight.bits != decltype(bits)::value) return;
    constexpr int WIDTH = decltype(bits)::value;
    result = call.dtype == DType::f16 ? launch_shape<WIDTH, DType::f16>(call, parts, splits, stream)
                                      : launch_shape<WIDTH, DType::bf16>(call, parts, splits, stream);
  };
  (one(std::integral_constant<int, BITS>()), ...);
  return result;
}

const char* declines(const Call& call) {
  const packed::Weight& w = call.weight;
  if (call.M < 0 || call.M > MOST_ROWS) return "decode takes up to 16 rows of x";
  if (call.int8) return "decode has no int8 activations";
  if (call.dtype != DType::f16 && call.dtype != DType::bf16) return "decode takes x in float16 or bfloat16";
  if (!one_of(w.bits, Widths())) return "decode takes codes of 1 to 8 bits";
  if (w.K < 1 || w.K > MOST_COLUMNS) return "decode takes 1 to 2^20 columns";
  if (w.N < 0 || w.N * w.G >= MOST_VALUES) return "decode takes fewer than 2^31 groups";
  if (w.blocks || w.row_bytes != (w.K + TILE - 1) / TILE * 32 * w.bits) return "decode reads codes in tiles";
  if (!aligned(w.packed)) return "decode reads codes that begin at a multiple of 16 bytes";
  return nullptr;
}

}  // namespace
}  // namespace decode
}  // namespace cuda
}  // namespace lowbit

extern "C" const char* lowbit_cuda_packed_decode_declines(const lowbit::Linear<lowbit::packed::Weight>* call) {
  return lowbit::cuda::decode::declines(*call);
}

extern "C" int lowbit_cuda_packed_decode_splits(const lowbit::Linear<lowbit::packed::Weight>* call, int processors) {
  return lowbit::cuda::decode::splits_for(*call, processors);
}

extern "C" int lowbit_cuda_packed_decode(const lowbit::Linear<lowbit::packed::Weight>* call, float* parts, int splits,
                                         void* stream) {
  using namespace lowbit::cuda::decode;
  if (declines(*call) != nullptr || splits < 1) return -1;
  if (call->M == 0 || call->weight.N == 0) return 0;
  if (splits > 1 && parts == nullptr) return -1;
  return launch_width(*call, parts, splits, static_cast<lowbit::cuda::Stream>(stream), Widths());
}
