#include "cuda/packed/linear.h"

#include "cuda/packed/batch_sm90.h"
#include "cuda/packed/decode.h"
#include "cuda/widths.h"

namespace lowbit {
namespace cuda {
namespace packed_linear {
namespace {

using Call = Linear<packed::Weight>;

// The order of decode's sums is not that of the kernels of many rows.
bool decodes(const Call& call) { return call.M <= packed_decode::MOST_ROWS && !call.batch_invariant; }

bool on_sm90(const Call& call, const Device& device) {
#ifdef LOWBIT_EMULATED
  constexpr bool COMPILED = false;  // the emulation has no tensor memory accelerator
#else
  constexpr bool COMPILED = true;
#endif
  return COMPILED && !decodes(call) && packed_batch_sm90::declines(call, device) == nullptr;
}

const char* declines(const Call& call, const Device& device) {
  const packed::Weight& w = call.weight;
  if (!has_width(w.bits)) return "the kernels take codes of 1 to 8 bits";
  return on_sm90(call, device) ? nullptr : packed_decode::declines(call);
}

int64_t workspace_bytes(const Call& call, const Device& device) {
  if (on_sm90(call, device)) return packed_batch_sm90::workspace_bytes(call, device);
  return packed_decode::workspace_bytes(call, device);
}

int run(const Call& call, const Device& device, void* workspace, void* stream) {
  if (call.M == 0 || call.weight.N == 0) return 0;
  const auto launch = [&](auto bits) {
    constexpr int BITS = decltype(bits)::value;
#ifndef LOWBIT_EMULATED
    if (on_sm90(call, device))
      return packed_batch_sm90::launch<BITS>(call, device, workspace, static_cast<Stream>(stream));
#endif
    return packed_decode::launch<BITS>(call, device, workspace, static_cast<Stream>(stream));
  };
  return with_width(call.weight.bits, launch, -1);
}

}  // namespace

const Op<Call> OP = {declines, workspace_bytes, run};

}  // namespace packed_linear
}  // namespace cuda
}  // namespace lowbit
