// The ops of the family `kron` on a GPU, in namespace lowbit_cuda; what they compute: lowbit/kron/op.py.
#pragma once
#include <torch/csrc/stable/library.h>

namespace lowbit {
namespace cuda {

void register_kron_ops(torch::stable::detail::StableLibrary& library);

}  // namespace cuda
}  // namespace lowbit
