// The CPU implementations of the ops of the family `codebook`; schemas, fakes and gradients: lowbit/codebook/op.py.
#pragma once
#include <torch/csrc/stable/library.h>

namespace lowbit {
namespace codebook {

void register_ops(torch::stable::detail::StableLibrary& library);

}  // namespace codebook
}  // namespace lowbit
