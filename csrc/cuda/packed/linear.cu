#include "cuda/packed/linear.h"

#include "cuda/packed/decode.h"
#include "cuda/widths.h"

namespace lowbit {
namespace cuda {
namespace packed_linear {
namespace {

using Call = Linear<packed::Weight>;

const char* declines(const Call& call, const Device&) {
  const packed::Weight& w = call.weight;
  if (!has_width(w.bits)) return "the kernels take codes of 1 to 8 bits";
  return packed_decode::declines(call);
}

int64_t workspace_bytes(const Call& call, const Device& device) { return packed_decode::workspace_bytes(call, device); }

int run(const Call& call, const Device& device, void* workspace, void* stream) {
  if (call.M == 0 || call.weight.N == 0) return 0;
  const auto launch = [&](auto bits) {
    return packed_decode::launch<decltype(bits)::value>(call, device, workspace, static_cast<Stream>(stream));
  };
  return with_width(call.weight.bits, launch, -1);
}

}  // namespace

const Op<Call> OP = {declines, workspace_bytes, run};

}  // namespace packed_linear
}  // namespace cuda
}  // namespace lowbit
