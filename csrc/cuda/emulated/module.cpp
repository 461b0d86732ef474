// The Python module lowbit_cuda_emulated: calls of emulated kernels for tests. It is never installed.
#include <dlfcn.h>
#include <pybind11/pybind11.h>

#include <vector>

#include "cuda/library.h"
#include "cuda/primitives.h"

namespace py = pybind11;

namespace {

using lowbit::DType;
using namespace lowbit::cuda;

DType dtype_of(const py::object& name) {
  if (name.is_none()) return DType::none;
  const std::string text = name.cast<std::string>();
  if (text == "float32") return DType::f32;
  if (text == "float16") return DType::f16;
  if (text == "bfloat16") return DType::bf16;
  if (text == "uint8") return DType::u8;
  throw py::value_error("no such dtype here: " + text);
}

// A library of emulated kernels: the sources as they are, or a copy with a planted bug.
class Kernels {
 public:
  explicit Kernels(const std::string& path) : library_(dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL)) {
    if (library_ == nullptr) throw std::runtime_error(dlerror());
    find("lowbit_emulation_begin", begin_);
    find("lowbit_emulation_allow", allow_);
    find("lowbit_emulation_end", end_);
    find("lowbit_emulation_device", set_device_);
    decltype(&lowbit_cuda_library) library;
    find("lowbit_cuda_library", library);
    table_ = library();
  }

  int packed_linear(const py::dict& arguments) {
    return run(table_->packed_linear, arguments, [&](lowbit::Linear<lowbit::packed::Weight>& call) {
      read_packed(arguments, call.weight);
      read_linear(arguments, call);
    });
  }

  int packed_rows(const py::dict& arguments) {
    return run(table_->packed_rows, arguments, [&](Rows<lowbit::packed::Weight>& call) {
      read_packed(arguments, call.weight);
      read_rows(arguments, call);
    });
  }

  int packed_experts(const py::dict& arguments) {
    return run(table_->packed_experts, arguments, [&](Experts<lowbit::packed::Weight>& call) {
      read_packed(arguments, call.linear.weight);
      read_experts(arguments, call);
    });
  }

  int codebook_experts(const py::dict& arguments) {
    return run(table_->codebook_experts, arguments, [&](Experts<lowbit::codebook::Weight>& call) {
      read_codebook(arguments, call.linear.weight);
      read_experts(arguments, call);
    });
  }

  int kron_linear(const py::dict& arguments) {
    return run(table_->kron_linear, arguments, [&](lowbit::Linear<lowbit::kron::Weight>& call) {
      read_kron(arguments, call.weight);
      read_linear(arguments, call);
    });
  }

  int kron_rows(const py::dict& arguments) {
    return run(table_->kron_rows, arguments, [&](Rows<lowbit::kron::Weight>& call) {
      read_kron(arguments, call.weight);
      read_rows(arguments, call);
    });
  }

  int codebook_rows(const py::dict& arguments) {
    return run(table_->codebook_rows, arguments, [&](Rows<lowbit::codebook::Weight>& call) {
      read_codebook(arguments, call.weight);
      read_rows(arguments, call);
    });
  }

  int codebook_linear(const py::dict& arguments) {
    return run(table_->codebook_linear, arguments, [&](lowbit::Linear<lowbit::codebook::Weight>& call) {
      read_codebook(arguments, call.weight);
      read_linear(arguments, call);
    });
  }

 private:
  template <class Function>
  void find(const char* name, Function& function) {
    function = reinterpret_cast<Function>(dlsym(library_, name));
    if (function == nullptr) throw std::runtime_error(dlerror());
  }

  // What `read` makes of the arguments, run on the device that they name. A workspace is full of NaN.
  template <class Call, class Read>
  int run(const Op<Call>& op, const py::dict& a, Read read) {
    const auto [architecture, processors, shared_bytes] = a["device"].cast<std::tuple<int, int, int>>();
    set_device_(architecture, processors, shared_bytes);
    begin_(a["order"].cast<int>());
    Call call{};
    read(call);
    Device device{};
    table_->device(0, device);
    if (const char* reason = op.declines(call, device)) {
      end_();
      throw py::value_error(reason);
    }
    std::vector<char> workspace(op.workspace_bytes(call, device) + 16, char(0xFF));
    char* const begin = workspace.data() + (16 - reinterpret_cast<uintptr_t>(workspace.data()) % 16) % 16;
    allow_(begin, workspace.size() - 16);
    const int error = op.run(call, device, begin, nullptr);
    end_();
    return error;
  }

  // The address of an array that the kernel may read or write, given as (address, bytes).
  char* array(const py::object& given) {
    if (given.is_none()) return nullptr;
    const auto [address, bytes] = given.cast<std::pair<uintptr_t, size_t>>();
    allow_(reinterpret_cast<const char*>(address), bytes);
    return reinterpret_cast<char*>(address);
  }

  static int64_t number(const py::dict& a, const char* name) { return a[name].cast<int64_t>(); }

  void read_codes(const py::dict& a, lowbit::Codes& w) {
    w.N = number(a, "N"), w.K = number(a, "K"), w.G = number(a, "G"), w.group_size = number(a, "group_size");
    w.bits = static_cast<int>(number(a, "bits")), w.row_bytes = number(a, "row_bytes");
    w.packed = reinterpret_cast<const uint8_t*>(array(a["packed"]));
    w.outliers.values = array(a["outlier_values"]), w.outliers.dtype = dtype_of(a["outlier_dtype"]);
    w.outliers.columns = array(a["outlier_columns"]), w.outliers.wide = number(a, "wide");
    w.outliers.rows = reinterpret_cast<const int32_t*>(array(a["outlier_rows"]));
  }

  void read_packed(const py::dict& a, lowbit::packed::Weight& w) {
    read_codes(a, w);
    w.scales = array(a["scales"]), w.scales_dtype = dtype_of(a["scales_dtype"]);
    w.zeros = array(a["zeros"]), w.zeros_dtype = dtype_of(a["zeros_dtype"]);
    w.scales_row = w.zeros_row = number(a, "scales_row"), w.scales_group = w.zeros_group = number(a, "scales_group");
    w.per_tensor = number(a, "per_tensor");
  }

  void read_factor(const py::dict& a, lowbit::kron::Factor& f) {
    f.N = number(a, "N"), f.K = number(a, "K"), f.G = number(a, "G"), f.group_size = number(a, "group_size");
    f.bits = static_cast<int>(number(a, "bits")), f.row_bytes = number(a, "row_bytes");
    f.values = array(a["values"]), f.dtype = dtype_of(a["dtype"]);
    f.scales = array(a["scales"]), f.scales_dtype = dtype_of(a["scales_dtype"]);
    f.zeros = array(a["zeros"]), f.zeros_dtype = dtype_of(a["zeros_dtype"]);
    f.per_tensor = number(a, "per_tensor");
  }

  void read_kron(const py::dict& a, lowbit::kron::Weight& w) {
    read_factor(a["a"].cast<py::dict>(), w.a), read_factor(a["b"].cast<py::dict>(), w.b);
    w.R = number(a, "R"), w.N = w.a.N * w.b.N, w.K = w.a.K * w.b.K;
    w.input_permutation = reinterpret_cast<const int32_t*>(array(a["input_permutation"]));
    w.output_permutation = reinterpret_cast<const int32_t*>(array(a["output_permutation"]));
  }

  void read_codebook(const py::dict& a, lowbit::codebook::Weight& w) {
    read_codes(a, w);
    w.codebook = array(a["codebook"]), w.codebook_dtype = dtype_of(a["codebook_dtype"]);
    w.tables = static_cast<lowbit::codebook::Weight::Tables>(number(a, "tables"));
    w.scales = array(a["scales"]), w.scales_dtype = dtype_of(a["scales_dtype"]);
    const auto floats = [&](const char* name) { return reinterpret_cast<const float*>(array(a[name])); };
    w.nested = {floats("scale_codebook"), floats("scale_absmax"), floats("scale_offset")};
  }

  template <class Weight>
  void read_linear(const py::dict& a, lowbit::Linear<Weight>& call) {
    call.M = number(a, "M"), call.x = array(a["x"]), call.dtype = dtype_of(a["dtype"]);
    call.bias = array(a["bias"]), call.bias_dtype = dtype_of(a["bias_dtype"]);
    call.int8 = number(a, "int8");
    if (a.contains("x_scale")) call.x_scale = reinterpret_cast<const float*>(array(a["x_scale"]));
    if (a.contains("x_group")) call.x_group = number(a, "x_group");
    call.batch_invariant = a.contains("batch_invariant") && number(a, "batch_invariant");
    call.y = array(a["y"]);
  }

  template <class Weight>
  void read_experts(const py::dict& a, Experts<Weight>& call) {
    read_linear(a, call.linear);
    call.ids = array(a["ids"]), call.wide = number(a, "wide_ids"), call.S = number(a, "S"), call.E = number(a, "E");
  }

  template <class Weight>
  void read_rows(const py::dict& a, Rows<Weight>& call) {
    call.ids = array(a["ids"]), call.wide = number(a, "wide_ids"), call.count = number(a, "count");
    call.out = array(a["out"]), call.dtype = dtype_of(a["dtype"]);
  }

  void* library_;
  void (*begin_)(int);
  void (*allow_)(const char*, size_t);
  void (*end_)();
  void (*set_device_)(int, int, int);
  const Library* table_;
};

}  // namespace

PYBIND11_MODULE(lowbit_cuda_emulated, m) {
  m.def("half_to_float", &emulation::half_to_float);
  m.def("float_to_half", &emulation::float_to_half);
  m.def("float_to_bfloat", &emulation::float_to_bfloat);
  py::class_<Kernels>(m, "Kernels")
      .def(py::init<std::string>())
      .def("packed_linear", &Kernels::packed_linear,
           "y = x @ W.T + bias: every argument by its name, arrays as (address, bytes). ValueError: the call is "
           "declined. RuntimeError: the kernel did something that a GPU would not survive.")
      .def("kron_linear", &Kernels::kron_linear, "y = x @ W.T + bias: a factor is a dictionary of its own.")
      .def("kron_rows", &Kernels::kron_rows, "out = W[ids].")
      .def("packed_experts", &Kernels::packed_experts, "y[i] = x[i // r] @ W[ids[i]].T + bias[ids[i]]: as packed_linear.")
      .def("packed_rows", &Kernels::packed_rows, "out = W[ids]: arguments and errors as those of packed_linear.")
      .def("codebook_experts", &Kernels::codebook_experts, "As packed_experts.")
      .def("codebook_linear", &Kernels::codebook_linear, "As packed_linear.")
      .def("codebook_rows", &Kernels::codebook_rows, "As packed_rows.");
}
