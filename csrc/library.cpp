// The registration of every native op. It uses torch's stable ABI: one binary serves every torch >= 2.10.
// The schemas of namespace `lowbit` are defined in Python (lowbit/<family>/op.py) before this library is loaded.
#include <string>

#include <torch/csrc/stable/library.h>

#include "cpu/blocks_layout_ops.h"
#include "cpu/codebook/ops.h"
#include "cpu/codebook/quantize_ops.h"
#include "cpu/gradients/ops.h"
#include "cpu/invariance.h"
#include "cpu/isa.h"
#include "cpu/kron/ops.h"
#include "cpu/packed/ops.h"
#include "cuda/ops/codebook.h"
#include "cuda/ops/kron.h"
#include "cuda/ops/library.h"
#include "cuda/ops/packed.h"

namespace {

std::string isas() { return lowbit::runnable_isas(); }
std::string isa() { return lowbit::isa_name(lowbit::current_isa()); }
void set_isa(std::string name) { lowbit::set_isa(name); }
bool batch_invariant() { return lowbit::batch_invariant; }
std::string open_cuda(std::string path) { return lowbit::cuda::open_library(path); }
std::string cuda_architectures() { return lowbit::cuda::library().architectures; }
void set_batch_invariant(bool on) { lowbit::batch_invariant = on; }

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lowbit, CPU, m) {
  lowbit::packed::register_ops(m);
  lowbit::codebook::register_ops(m);
  lowbit::kron::register_ops(m);
}

STABLE_TORCH_LIBRARY(lowbit_native, m) {
  m.def("isas() -> str");
  m.def("isa() -> str");
  m.def("set_isa(str name) -> ()");
  m.def("batch_invariant() -> bool");
  m.def("set_batch_invariant(bool on) -> ()");
  m.def("kmeans_optimal(Tensor x, Tensor? weights, int clusters, int choices=67108864) -> Tensor");
  m.def(
      "sums_by_code(Tensor? d, Tensor packed, Tensor? scales, int bits, int in_features, int group_size, bool grouped) "
      "-> Tensor");
  m.def(
      "sampled_products(Tensor dy, Tensor x, Tensor outlier_values, Tensor outlier_columns, Tensor outlier_rows) "
      "-> Tensor");
  m.def("block(Tensor packed, int bits) -> Tensor");
  m.def("block_(Tensor(a!) packed, int bits) -> ()");
  m.def("unblock(Tensor blocks, int bits) -> Tensor");
  m.def("huge_pages(Tensor packed) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(lowbit_native, CompositeExplicitAutograd, m) {
  m.impl("isas", TORCH_BOX(&isas));
  m.impl("isa", TORCH_BOX(&isa));
  m.impl("set_isa", TORCH_BOX(&set_isa));
  m.impl("batch_invariant", TORCH_BOX(&batch_invariant));
  m.impl("set_batch_invariant", TORCH_BOX(&set_batch_invariant));
}

// The ops of the families again, for who calls this backend itself.
STABLE_TORCH_LIBRARY_IMPL(lowbit_native, CPU, m) {
  lowbit::packed::register_ops(m);
  lowbit::codebook::register_ops(m);
  lowbit::kron::register_ops(m);
  m.impl("kmeans_optimal", TORCH_BOX(&lowbit::codebook::kmeans_optimal_cpu));
  m.impl("sums_by_code", TORCH_BOX(&lowbit::gradients::sums_by_code_cpu));
  m.impl("sampled_products", TORCH_BOX(&lowbit::gradients::sampled_products_cpu));
  m.impl("block", TORCH_BOX(&lowbit::block_cpu));
  m.impl("block_", TORCH_BOX(&lowbit::block_in_place_cpu));
  m.impl("unblock", TORCH_BOX(&lowbit::unblock_cpu));
  m.impl("huge_pages", TORCH_BOX(&lowbit::huge_pages_cpu));
}

// The other schemas of this namespace: lowbit/backends/ops.py.
STABLE_TORCH_LIBRARY(lowbit_cuda, m) {
  m.def("open(str path) -> str");
  m.def("architectures() -> str");
}

// The kernels of liblowbit_cuda.so, on any device: on a CPU its emulation runs.
STABLE_TORCH_LIBRARY_IMPL(lowbit_cuda, CompositeExplicitAutograd, m) {
  m.impl("open", TORCH_BOX(&open_cuda));
  m.impl("architectures", TORCH_BOX(&cuda_architectures));
  lowbit::cuda::register_packed_ops(m);
  lowbit::cuda::register_codebook_ops(m);
  lowbit::cuda::register_kron_ops(m);
}
