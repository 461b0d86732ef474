#include "cuda/library.h"

#include "cuda/codebook/linear.h"
#include "cuda/codebook/rows.h"
#include "cuda/codebook/stack.h"
#include "cuda/host.h"
#include "cuda/kron/linear.h"
#include "cuda/kron/rows.h"
#include "cuda/packed/linear.h"
#include "cuda/packed/rows.h"
#include "cuda/packed/stack.h"

const lowbit::cuda::Library* lowbit_cuda_library() {
  using namespace lowbit::cuda;
  static const Library library = [] {
    Library all{};
    all.bytes = sizeof(Library);
    all.device = read_device;
    all.error = error_text;
    all.architectures = ARCHITECTURES;
    all.packed_linear = packed_linear::OP;
    all.packed_rows = packed_rows::OP;
    all.packed_experts = packed_experts::OP;
    all.codebook_linear = codebook_linear::OP;
    all.codebook_rows = codebook_rows::OP;
    all.codebook_experts = codebook_experts::OP;
    all.kron_linear = kron_linear::OP;
    all.kron_rows = kron_rows::OP;
    return all;
  }();
  return &library;
}
