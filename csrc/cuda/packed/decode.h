// The C entry points of packed/decode.cu.
#pragma once
#include "common/packed.h"

extern "C" {

// Why lowbit_cuda_packed_decode does not take a call; null: it does.
__attribute__((visibility("default"))) const char* lowbit_cuda_packed_decode_declines(
    const lowbit::Linear<lowbit::packed::Weight>* call);

// Starts the product on a stream of CUDA, and allocates nothing. The codes are in tiles: `packed` [N, row_bytes], where
// row_bytes = ceil(K / 256) * 32 * bits. Returns 0, an error code of CUDA, or -1 where the call is declined.
__attribute__((visibility("default"))) int lowbit_cuda_packed_decode(
    const lowbit::Linear<lowbit::packed::Weight>* call, void* stream);
}
