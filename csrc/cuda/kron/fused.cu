// Launches of kron/fused.cuh.
#include "cuda/kron/fused.cuh"

namespace lowbit {
namespace cuda {
namespace kron_fused {
namespace {

// How a call is run.
struct Plan {
  bool a_first, direct;  // which factor is Q; whether x and Q are float16, and multiplied as they are
  int q_planes, p_planes, x_planes, rows, stages, shared;  // shared: bytes; 0: there is no such plan
  Sizes sizes;
  int64_t cost;
};

bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

int planes_of(DType dtype) { return dtype == DType::bf16 ? 1 : dtype == DType::f16 ? 2 : 3; }

int rounded_up(int64_t size, int unit) { return static_cast<int>((size + unit - 1) / unit * unit); }

Plan plan_of(const Call& call, const Device& device, bool a_first) {
  const kron::Weight& w = call.weight;
  const kron::Factor &q = a_first ? w.a : w.b, &p = a_first ? w.b : w.a;
  Plan plan{};
  plan.a_first = a_first;
  plan.direct = call.dtype == DType::f16 && q.dtype == DType::f16;
  plan.q_planes = plan.direct ? 1 : planes_of(q.dtype);
  plan.x_planes = plan.direct ? 1 : planes_of(call.dtype);
  plan.p_planes = planes_of(p.dtype);

  const int NQ = rounded_up(q.N, 16), NP = rounded_up(p.N, 8), KQ = rounded_up(q.K, 32), KP = rounded_up(p.K, 32);
  const int64_t repeated = NP <= 128 ? 1 : (NP + 127) / 128;
  plan.cost = int64_t(NQ) * KP * (KQ * repeated * plan.q_planes * plan.x_planes + int64_t(NP) * 3 * plan.p_planes);

  // Two rows of x on their way, two blocks on a processor, where they fit
  const auto sizes = [&](int rows, int stages) {
    return sizes_of(w.R, q.N, q.K, p.N, p.K, w.a.N, w.b.N, plan.q_planes, plan.p_planes, plan.x_planes, rows, stages);
  };
  const int half = (device.shared_bytes + 1024) / 2 - 1024;
  const int most = static_cast<int>(std::min<int64_t>(call.M, std::max(1, THREADS / 32 / (NQ / 16))));
  for (const int limit : {half, device.shared_bytes})
    for (const int stages : {2, 1})
      for (int rows = std::max(1, most); rows > 0; rows /= 2) {
        const Sizes s = sizes(rows, stages);
        if (s.total > limit) continue;
        plan.rows = rows, plan.stages = stages, plan.sizes = s, plan.shared = s.total;
        return plan;
      }
  return plan;
}

// The cheaper order of the two; x is transposed where `a` comes first.
Plan plan_of(const Call& call, const Device& device) {
  const Plan b_first = plan_of(call, device, false), a_first = plan_of(call, device, true);
  if (a_first.shared == 0 || b_first.shared == 0) return a_first.shared == 0 ? b_first : a_first;
  return a_first.cost * 5 < b_first.cost * 4 ? a_first : b_first;
}

bool copied(const kron::Factor& f, DType as) { return f.dtype == as && f.K % 8 == 0 && aligned(f.values); }

template <DType T, int P_TILES>
int launch_instance(const Call& call, const Device& device, const Plan& plan, Stream stream) {
  const kron::Weight& w = call.weight;
  const kron::Factor &q = plan.a_first ? w.a : w.b, &p = plan.a_first ? w.b : w.a;
  const Sizes& s = plan.sizes;
  const int64_t steps = (call.M + plan.rows - 1) / plan.rows;
  const int together = P_TILES <= 8 && 2 * (plan.shared + 1024) <= device.shared_bytes + 1024 ? 2 : 1;
  const int blocks = static_cast<int>(std::min<int64_t>(steps, int64_t(together) * device.processors));
  const bool copy_x = plan.x_planes == 1 && !plan.a_first && w.input_permutation == nullptr && w.b.K % 8 == 0 &&
                      aligned(call.x);
  const int lanes = call.dtype == DType::f32 ? 4 : 8;
  const bool vectors = w.output_permutation == nullptr && w.b.N % lanes == 0 && aligned(call.y);
  const Divisor by_k2 = divisor_of(w.b.K), by_n2 = divisor_of(w.b.N);
  const auto groups = [](const kron::Factor& f) { return f.per_tensor ? 0 : f.G; };
  return lowbit::cuda::launch(
      &kernel<T, P_TILES>, blocks, THREADS, plan.shared, stream, call.x, call.y, call.bias, w.input_permutation,
      w.output_permutation, q.values, q.scales, q.zeros, p.values, p.scales, p.zeros, call.M, w.R, q.N, q.K, p.N, p.K,
      plan.a_first, static_cast<int>(call.dtype), static_cast<int>(call.bias_dtype), static_cast<int>(q.dtype), q.bits,
      q.row_bytes / 4, groups(q), q.group_size, static_cast<int>(q.scales_dtype), static_cast<int>(q.zeros_dtype),
      static_cast<int>(p.dtype), p.bits, p.row_bytes / 4, groups(p), p.group_size, static_cast<int>(p.scales_dtype),
      static_cast<int>(p.zeros_dtype), plan.q_planes, plan.p_planes, plan.x_planes, plan.rows, plan.stages, blocks,
      copied(q, T), copied(p, DType::bf16), copy_x, vectors, by_k2.factor, by_k2.shift, by_n2.factor, by_n2.shift,
      s.p, s.x, s.y, s.q_pitch, s.p_pitch, s.y_pitch, s.q_plane, s.p_plane, s.x_plane, s.y_row);
}

template <DType T>
int launch_type(const Call& call, const Device& device, const Plan& plan, Stream stream) {
  return (plan.a_first ? call.weight.b.N : call.weight.a.N) <= 64
             ? launch_instance<T, 8>(call, device, plan, stream)
             : launch_instance<T, 16>(call, device, plan, stream);
}

}  // namespace

const char* declines(const Call& call, const Device& device) {
  constexpr int64_t MOST = 1 << 20;
  const kron::Weight& w = call.weight;
  if (call.M < 0 || call.M >= (int64_t(1) << 31) - 16) return "fused takes fewer than 2^31 - 16 rows of x";
  if (call.int8) return "fused has no int8 activations";
  if (call.dtype != DType::f32 && call.dtype != DType::f16 && call.dtype != DType::bf16)
    return "fused takes x in float32, float16 or bfloat16";
  for (const kron::Factor* f : {&w.a, &w.b})
    if (f->N < 1 || f->K < 1 || f->N > MOST || f->K > MOST || f->N * f->K > MOST || w.R * f->N * f->K > MOST)
      return "the factors do not fit shared memory";
  if (w.N > MOST || w.K > MOST || plan_of(call, device).shared == 0)
    return "the factors and a row of x and of y do not fit shared memory";
  return nullptr;
}

int launch(const Call& call, const Device& device, Stream stream) {
  const Plan plan = plan_of(call, device);
  return plan.direct ? launch_type<DType::f16>(call, device, plan, stream)
                     : launch_type<DType::bf16>(call, device, plan, stream);
}

}  // namespace kron_fused
}  // namespace cuda
}  // namespace lowbit
