#include "cuda/packed/linear.h"

#include "cuda/packed/batch.h"
#include "cuda/packed/batch_int8.h"
#include "cuda/packed/batch_sm90.h"
#include "cuda/packed/decode.h"
#include "cuda/packed/decode_int8.h"
#include "cuda/widths.h"

namespace lowbit {
namespace cuda {
namespace packed_linear {
namespace {

using Call = Linear<packed::Weight>;

enum class Kernel { decode, decode_int8, batch, batch_int8, batch_sm90 };

// The kernels add in different orders: where a row of y may not depend on M, nor on where x lies, batch takes every call.
Kernel kernel_of(const Call& call, const Device& device) {
#ifdef LOWBIT_EMULATED
  constexpr bool HAS_SM90 = false;  // the emulation has no tensor memory accelerator
#else
  constexpr bool HAS_SM90 = true;
#endif
  const bool float32 = call.dtype == DType::f32;  // which decode alone takes, 8 rows at a time
  if (call.int8)
    return call.batch_invariant || call.M > decode::MOST_ROWS ? Kernel::batch_int8 : Kernel::decode_int8;
  if (float32) return Kernel::decode;
  if (call.batch_invariant) return Kernel::batch;
  if (call.M <= packed_decode::MOST_ROWS) return Kernel::decode;
  return HAS_SM90 && packed_batch_sm90::declines(call, device) == nullptr ? Kernel::batch_sm90 : Kernel::batch;
}

const char* declines(const Call& call, const Device& device) {
  if (!has_width(call.weight.bits)) return "the kernels take codes of 1 to 8 bits";
  switch (kernel_of(call, device)) {
    case Kernel::decode: return packed_decode::declines(call);
    case Kernel::decode_int8: return packed_decode_int8::declines(call);
    case Kernel::batch: return packed_batch::declines(call, device);
    case Kernel::batch_int8: return packed_batch_int8::declines(call, device);
    default: return nullptr;
  }
}

int64_t workspace_bytes(const Call& call, const Device& device) {
  const auto of_batch = [&](auto bits) { return packed_batch::workspace_bytes<decltype(bits)::value>(call, device); };
  switch (kernel_of(call, device)) {
    case Kernel::decode: return packed_decode::workspace_bytes(call, device);
    case Kernel::decode_int8: return packed_decode_int8::workspace_bytes(call, device);
    case Kernel::batch: return with_width(call.weight.bits, of_batch, int64_t(0));
    case Kernel::batch_int8: return packed_batch_int8::workspace_bytes(call, device);
    default: return packed_batch_sm90::workspace_bytes(call, device);
  }
}

int run(const Call& call, const Device& device, void* workspace, void* stream) {
  if (call.M == 0 || call.weight.N == 0) return 0;
  const auto launch = [&](auto bits) {
    constexpr int BITS = decltype(bits)::value;
    const Kernel kernel = kernel_of(call, device);
    auto start = kernel == Kernel::decode        ? &packed_decode::launch<BITS>
                 : kernel == Kernel::decode_int8 ? &packed_decode_int8::launch<BITS>
                 : kernel == Kernel::batch_int8  ? &packed_batch_int8::launch<BITS>
                                                 : &packed_batch::launch<BITS>;
#ifndef LOWBIT_EMULATED
    if (kernel == Kernel::batch_sm90) start = &packed_batch_sm90::launch<BITS>;
#endif
    return start(call, device, workspace, static_cast<Stream>(stream));
  };
  return with_width(call.weight.bits, launch, -1);
}

}  // namespace

const Op<Call> OP = {declines, workspace_bytes, run};

}  // namespace packed_linear
}  // namespace cuda
}  // namespace lowbit
