// The C entry points of packed/decode.cu.
#pragma once
#include "common/packed.h"

extern "C" {

// Why lowbit_cuda_packed_decode does not take a call; null: it does.
__attribute__((visibility("default"))) const char* lowbit_cuda_packed_decode_declines(
    const lowbit::Linear<lowbit::packed::Weight>* call);

// Into how many splits K is to be cut on a GPU of so many processors. It does not depend on M.
__attribute__((visibility("default"))) int lowbit_cuda_packed_decode_splits(
    const lowbit::Linear<lowbit::packed::Weight>* call, int processors);

// Starts the product on a stream of CUDA, and allocates nothing. The codes are in tiles: `packed` [N, row_bytes], where
// row_bytes = ceil(K / 256) * 32 * bits. `parts` has room for splits * M * N numbers where splits > 1. Returns 0, an
// error code of CUDA, or -1 where the call is declined.
__attribute__((visibility("default"))) int lowbit_cuda_packed_decode(
    const lowbit::Linear<lowbit::packed::Weight>* call, float* parts, int splits, void* stream);
}
