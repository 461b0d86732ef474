// Launches of kron/gather.cuh.
#include "cuda/kron/gather.cuh"

#include <algorithm>

namespace lowbit {
namespace cuda {
namespace kron_gather {
namespace {

constexpr int64_t MOST_ROWS = 16;

// Of shared memory, for one row of `out`.
int64_t bytes_of(const kron::Weight& w) { return w.R * ((w.a.K + 3) / 4 * 4 + (w.b.K + 3) / 4 * 4) * 4; }

template <DType T>
int launch_dtype(const Call& call, const Device& device, Stream stream) {
  constexpr int LANES = T == DType::f32 ? 4 : 8;
  const kron::Weight& w = call.weight;
  // Four vectors for each thread, where that many rows fit a quarter of a processor
  const int64_t in_row = std::max<int64_t>(1, w.K / LANES), room = device.shared_bytes / 4 / bytes_of(w);
  const int64_t rows = std::max<int64_t>(1, std::min({4 * THREADS / in_row, room, call.count, MOST_ROWS}));
  const int blocks = static_cast<int>((call.count + rows - 1) / rows);
  const bool vectors = w.K % LANES == 0 && reinterpret_cast<uintptr_t>(call.out) % 16 == 0;
  const bool unpermuted = w.input_permutation == nullptr && w.b.K % LANES == 0;
  const Divisor by_k2 = divisor_of(w.b.K), by_vectors = divisor_of(in_row);
  const auto groups = [](const kron::Factor& f) { return f.per_tensor ? 0 : f.G; };
  return lowbit::cuda::launch(
      &kernel<T>, blocks, THREADS, static_cast<int>(rows * bytes_of(w)), stream, w.a.values, w.a.scales, w.a.zeros,
      w.b.values, w.b.scales, w.b.zeros, call.ids, w.input_permutation, w.output_permutation, call.out, call.count, w.R,
      w.a.N, w.a.K, w.b.N, w.b.K, static_cast<int>(w.a.dtype), w.a.bits, w.a.row_bytes / 4, groups(w.a),
      w.a.group_size, static_cast<int>(w.a.scales_dtype), static_cast<int>(w.a.zeros_dtype),
      static_cast<int>(w.b.dtype), w.b.bits, w.b.row_bytes / 4, groups(w.b), w.b.group_size,
      static_cast<int>(w.b.scales_dtype), static_cast<int>(w.b.zeros_dtype), call.wide, rows, vectors, unpermuted,
      by_k2.factor, by_k2.shift, by_vectors.factor, by_vectors.shift);
}

}  // namespace

const char* declines(const Call& call, const Device& device) {
  constexpr int64_t MOST = int64_t(1) << 31;
  const kron::Weight& w = call.weight;
  if (call.dtype != DType::f32 && call.dtype != DType::f16 && call.dtype != DType::bf16)
    return "gather writes float32, float16 or bfloat16";
  if (call.count < 0 || call.count >= MOST) return "gather writes fewer than 2^31 rows";
  if (w.R < 1 || w.N < 1 || w.K < 1 || w.N >= MOST || w.K >= MOST / 8) return "gather takes 1 to 2^28 columns";
  if (w.R >= MOST || bytes_of(w) > device.shared_bytes) return "the rows of two factors do not fit shared memory";
  for (const kron::Factor* f : {&w.a, &w.b})
    if (f->bits * f->K >= MOST) return "gather takes rows of factors of fewer than 2^31 bits";
  return nullptr;
}

int launch(const Call& call, const Device& device, Stream stream) {
  switch (call.dtype) {
    case DType::f32: return launch_dtype<DType::f32>(call, device, stream);
    case DType::f16: return launch_dtype<DType::f16>(call, device, stream);
    default: return launch_dtype<DType::bf16>(call, device, stream);
  }
}

}  // namespace kron_gather
}  // namespace cuda
}  // namespace lowbit
