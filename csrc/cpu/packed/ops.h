// The CPU implementations of the ops of the family `packed`; schemas, fakes and gradients: lowbit/packed/op.py.
#pragma once
#include <torch/csrc/stable/library.h>

namespace lowbit {
namespace packed {

void register_ops(torch::stable::detail::StableLibrary& library);

}  // namespace packed
}  // namespace lowbit
