#include "cuda/kron/linear.h"

#include "cuda/kron/fused.h"

namespace lowbit {
namespace cuda {
namespace kron_linear {
namespace {

using Call = Linear<kron::Weight>;

int64_t workspace_bytes(const Call&, const Device&) { return 0; }

int run(const Call& call, const Device& device, void*, void* stream) {
  if (call.M == 0) return 0;
  return kron_fused::launch(call, device, static_cast<Stream>(stream));
}

}  // namespace

const Op<Call> OP = {kron_fused::declines, workspace_bytes, run};

}  // namespace kron_linear
}  // namespace cuda
}  // namespace lowbit
