#include "cuda/codebook/stack.h"

#include "cuda/codebook/experts.h"
#include "cuda/widths.h"

namespace lowbit {
namespace cuda {
namespace codebook_experts {
namespace {

const char* why_not(const Call& call, const Device& device) {
  if (!has_width(call.linear.weight.bits)) return "the kernels take codes of 1 to 8 bits";
  const auto of_width = [&](auto bits) { return declines<decltype(bits)::value>(call, device); };
  return with_width(call.linear.weight.bits, of_width, nullptr);
}

int64_t bytes(const Call& call, const Device& device) {
  const auto of_width = [&](auto bits) { return workspace_bytes<decltype(bits)::value>(call, device); };
  return with_width(call.linear.weight.bits, of_width, int64_t(0));
}

int run(const Call& call, const Device& device, void* workspace, void* stream) {
  if (call.S == 0 || call.linear.weight.N == 0) return 0;
  const auto start = [&](auto bits) {
    return launch<decltype(bits)::value>(call, device, workspace, static_cast<Stream>(stream));
  };
  return with_width(call.linear.weight.bits, start, -1);
}

}  // namespace

const Op<Call> OP = {why_not, bytes, run};

}  // namespace codebook_experts
}  // namespace cuda
}  // namespace lowbit
