#include "cuda/codebook/linear.h"

#include "cuda/codebook/decode.h"
#include "cuda/widths.h"

namespace lowbit {
namespace cuda {
namespace codebook_linear {
namespace {

using Call = Linear<codebook::Weight>;

const char* declines(const Call& call, const Device& device) {
  if (!has_width(call.weight.bits)) return "the kernels take codes of 1 to 8 bits";
  return codebook_decode::declines(call, device);
}

int64_t workspace_bytes(const Call& call, const Device& device) {
  return codebook_decode::workspace_bytes(call, device);
}

int run(const Call& call, const Device& device, void* workspace, void* stream) {
  if (call.M == 0 || call.weight.N == 0) return 0;
  const auto launch = [&](auto bits) {
    return codebook_decode::launch<decltype(bits)::value>(call, device, workspace, static_cast<Stream>(stream));
  };
  return with_width(call.weight.bits, launch, -1);
}

}  // namespace

const Op<Call> OP = {declines, workspace_bytes, run};

}  // namespace codebook_linear
}  // namespace cuda
}  // namespace lowbit
