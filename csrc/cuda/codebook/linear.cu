#include "cuda/codebook/linear.h"

#include "cuda/codebook/batch.h"
#include "cuda/codebook/batch_sm90.h"
#include "cuda/codebook/decode.h"
#include "cuda/codebook/decode_simt.h"
#include "cuda/codebook/linear_int8.h"
#include "cuda/widths.h"

namespace lowbit {
namespace cuda {
namespace codebook_linear {
namespace {

using Call = Linear<codebook::Weight>;

enum class Kernel { decode, decode_simt, batch, batch_sm90, int8 };

// The kernels add in different orders: where a row of y may not depend on M, nor on where x lies, one of them takes every
// call. That with int8 activations adds integers.
Kernel kernel_of(const Call& call, const Device& device) {
#ifdef LOWBIT_EMULATED
  constexpr bool HAS_SM90 = false;  // the emulation has no tensor memory accelerator
#else
  constexpr bool HAS_SM90 = true;
#endif
  if (call.int8) return Kernel::int8;
  if (call.dtype == DType::f32) return Kernel::decode_simt;  // 8 rows at a time
  if (call.batch_invariant) return Kernel::batch;
  if (call.M <= decode::MOST_ROWS)
    return codebook_decode_simt::takes(call) ? Kernel::decode_simt : Kernel::decode;
  return HAS_SM90 && codebook_batch_sm90::declines(call, device) == nullptr ? Kernel::batch_sm90 : Kernel::batch;
}

const char* declines(const Call& call, const Device& device) {
  if (!has_width(call.weight.bits)) return "the kernels take codes of 1 to 8 bits";
  const auto of_batch = [&](auto bits) { return codebook_batch::declines<decltype(bits)::value>(call, device); };
  switch (kernel_of(call, device)) {
    case Kernel::decode: return codebook_decode::declines(call, device);
    case Kernel::decode_simt: return codebook_decode_simt::declines(call, device);
    case Kernel::batch: return with_width(call.weight.bits, of_batch, nullptr);
    case Kernel::int8: return codebook_linear_int8::declines(call, device);
    default: return nullptr;
  }
}

int64_t workspace_bytes(const Call& call, const Device& device) {
  const auto of_batch = [&](auto bits) { return codebook_batch::workspace_bytes<decltype(bits)::value>(call, device); };
  switch (kernel_of(call, device)) {
    case Kernel::decode: return codebook_decode::workspace_bytes(call, device);
    case Kernel::decode_simt: return codebook_decode_simt::workspace_bytes(call, device);
    case Kernel::batch: return with_width(call.weight.bits, of_batch, int64_t(0));
    case Kernel::int8: return codebook_linear_int8::workspace_bytes(call, device);
    default: return codebook_batch_sm90::workspace_bytes(call, device);
  }
}

int run(const Call& call, const Device& device, void* workspace, void* stream) {
  if (call.M == 0 || call.weight.N == 0) return 0;
  const auto launch = [&](auto bits) {
    constexpr int BITS = decltype(bits)::value;
    const Kernel kernel = kernel_of(call, device);
    auto start = kernel == Kernel::decode        ? &codebook_decode::launch<BITS>
                 : kernel == Kernel::decode_simt ? &codebook_decode_simt::launch<BITS>
                 : kernel == Kernel::int8        ? &codebook_linear_int8::launch<BITS>
                                                 : &codebook_batch::launch<BITS>;
#ifndef LOWBIT_EMULATED
    if (kernel == Kernel::batch_sm90) start = &codebook_batch_sm90::launch<BITS>;
#endif
    return start(call, device, workspace, static_cast<Stream>(stream));
  };
  return with_width(call.weight.bits, launch, -1);
}

}  // namespace

const Op<Call> OP = {declines, workspace_bytes, run};

}  // namespace codebook_linear
}  // namespace cuda
}  // namespace lowbit
