// The ops of the family `packed` on a GPU, in namespace lowbit_cuda; what they compute: lowbit/packed/op.py.
#pragma once
#include <torch/csrc/stable/library.h>

namespace lowbit {
namespace cuda {

void register_packed_ops(torch::stable::detail::StableLibrary& library);

}  // namespace cuda
}  // namespace lowbit
