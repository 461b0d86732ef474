// The ops of the family `codebook` on a GPU, in namespace lowbit_cuda; what they compute: lowbit/codebook/op.py.
#pragma once
#include <torch/csrc/stable/library.h>

namespace lowbit {
namespace cuda {

void register_codebook_ops(torch::stable::detail::StableLibrary& library);

}  // namespace cuda
}  // namespace lowbit
