#include "cuda/kron/rows.h"

#include "cuda/kron/gather.h"

namespace lowbit {
namespace cuda {
namespace kron_rows {
namespace {

using Call = Rows<kron::Weight>;

int64_t workspace_bytes(const Call&, const Device&) { return 0; }

int run(const Call& call, const Device& device, void*, void* stream) {
  if (call.count == 0) return 0;
  return kron_gather::launch(call, device, static_cast<Stream>(stream));
}

}  // namespace

const Op<Call> OP = {kron_gather::declines, workspace_bytes, run};

}  // namespace kron_rows
}  // namespace cuda
}  // namespace lowbit
