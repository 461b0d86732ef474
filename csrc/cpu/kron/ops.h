// The CPU implementations of the ops of the family `kron`; schemas, fakes and gradients: lowbit/kron/op.py.
#pragma once
#include <torch/csrc/stable/library.h>

namespace lowbit {
namespace kron {

void register_ops(torch::stable::detail::StableLibrary& library);

}  // namespace kron
}  // namespace lowbit
