// The ops of namespace `lowbit_native` on the memory of packed codes: to the layout `blocks` and back
// (lowbit/backends/cpu/blocks.py), and its pages.
#pragma once
#include <torch/csrc/stable/tensor.h>

namespace lowbit {

// Canonical words, int32 [N, U*bits], to blocks, int32 [N, U, bits, 1]: a permutation of their bits
torch::stable::Tensor block_cpu(torch::stable::Tensor packed, int64_t bits);

// The same in place: the tensor then holds the words of blocks
void block_in_place_cpu(torch::stable::Tensor packed, int64_t bits);

// The inverse of block_cpu
torch::stable::Tensor unblock_cpu(torch::stable::Tensor blocks, int64_t bits);

// Asks for huge pages under a tensor's memory, which stays where it is
void huge_pages_cpu(torch::stable::Tensor packed);

}  // namespace lowbit
