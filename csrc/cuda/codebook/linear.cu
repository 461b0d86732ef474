#include "cuda/codebook/linear.h"

#include "cuda/codebook/batch.h"
#include "cuda/codebook/decode.h"
#include "cuda/widths.h"

namespace lowbit {
namespace cuda {
namespace codebook_linear {
namespace {

using Call = Linear<codebook::Weight>;

// The order of decode's sums is not that of batch's.
bool decodes(const Call& call) { return call.M <= decode::MOST_ROWS && !call.batch_invariant; }

const char* declines(const Call& call, const Device& device) {
  if (!has_width(call.weight.bits)) return "the kernels take codes of 1 to 8 bits";
  if (decodes(call)) return codebook_decode::declines(call, device);
  const auto reason = [&](auto bits) { return codebook_batch::declines<decltype(bits)::value>(call, device); };
  return with_width(call.weight.bits, reason, nullptr);
}

int64_t workspace_bytes(const Call& call, const Device& device) {
  if (decodes(call)) return codebook_decode::workspace_bytes(call, device);
  const auto bytes = [&](auto bits) { return codebook_batch::workspace_bytes<decltype(bits)::value>(call, device); };
  return with_width(call.weight.bits, bytes, int64_t(0));
}

int run(const Call& call, const Device& device, void* workspace, void* stream) {
  if (call.M == 0 || call.weight.N == 0) return 0;
  const auto launch = [&](auto bits) {
    constexpr int BITS = decltype(bits)::value;
    const auto start = decodes(call) ? &codebook_decode::launch<BITS> : &codebook_batch::launch<BITS>;
    return start(call, device, workspace, static_cast<Stream>(stream));
  };
  return with_width(call.weight.bits, launch, -1);
}

}  // namespace

const Op<Call> OP = {declines, workspace_bytes, run};

}  // namespace codebook_linear
}  // namespace cuda
}  // namespace lowbit
