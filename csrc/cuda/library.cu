#include "cuda/library.h"

#include "cuda/codebook/linear.h"
#include "cuda/codebook/rows.h"
#include "cuda/kron/linear.h"
#include "cuda/kron/rows.h"
#include "cuda/packed/linear.h"
#include "cuda/packed/rows.h"
#include "cuda/primitives.h"

const lowbit::cuda::Library* lowbit_cuda_library() {
  using namespace lowbit::cuda;
  static const Library library = {
      sizeof(Library), read_device,     error_text,    packed_linear::OP,
      packed_rows::OP, kron_linear::OP, kron_rows::OP, codebook_linear::OP,
      codebook_rows::OP,
  };
  return &library;
}
