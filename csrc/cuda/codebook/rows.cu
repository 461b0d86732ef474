#include "cuda/codebook/rows.h"

#include "cuda/codebook/gather.h"
#include "cuda/widths.h"

namespace lowbit {
namespace cuda {
namespace codebook_rows {
namespace {

using Call = Rows<codebook::Weight>;

const char* declines(const Call& call, const Device&) {
  if (!has_width(call.weight.bits)) return "the kernels take codes of 1 to 8 bits";
  return codebook_gather::declines(call);
}

int64_t workspace_bytes(const Call&, const Device&) { return 0; }

int run(const Call& call, const Device&, void*, void* stream) {
  if (call.count == 0) return 0;
  const auto launch = [&](auto bits) {
    return codebook_gather::launch<decltype(bits)::value>(call, static_cast<Stream>(stream));
  };
  return with_width(call.weight.bits, launch, -1);
}

}  // namespace

const Op<Call> OP = {declines, workspace_bytes, run};

}  // namespace codebook_rows
}  // namespace cuda
}  // namespace lowbit
