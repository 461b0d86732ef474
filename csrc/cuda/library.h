// What liblowbit_cuda.so exports: one function, which returns a table of functions. The library knows no torch, so that
// one build serves every torch; csrc/cuda/ops has the ops of torch that call it.
#pragma once
#include <cstdint>

#include "common/codebook.h"
#include "common/kron.h"
#include "common/packed.h"
#include "cuda/device.h"
#include "cuda/rows.h"
#include "cuda/stack.h"

namespace lowbit {
namespace cuda {

// One op of one family. Nothing here waits for the GPU, allocates, or reads a tensor.
template <class Call>
struct Op {
  const char* (*declines)(const Call& call, const Device& device);  // why it takes no such call; null: it does
  int64_t (*workspace_bytes)(const Call& call, const Device& device);
  // Starts the kernels on a stream of the current device; an error code of CUDA, 0: none.
  int (*run)(const Call& call, const Device& device, void* workspace, void* stream);
};

struct Library {
  int64_t bytes;                     // sizeof(Library): who was compiled with another header sees it here
  int (*device)(int index, Device&);  // an error code of CUDA, 0: none
  const char* (*error)(int code);
  const char* architectures;  // "800,900": what it was compiled for; empty: the emulation
  Op<Linear<packed::Weight>> packed_linear;
  Op<Rows<packed::Weight>> packed_rows;
  Op<Linear<kron::Weight>> kron_linear;
  Op<Rows<kron::Weight>> kron_rows;
  Op<Linear<codebook::Weight>> codebook_linear;
  Op<Rows<codebook::Weight>> codebook_rows;
  Op<Experts<packed::Weight>> packed_experts;
  Op<Experts<codebook::Weight>> codebook_experts;
};

}  // namespace cuda
}  // namespace lowbit

extern "C" __attribute__((visibility("default"))) const lowbit::cuda::Library* lowbit_cuda_library();
