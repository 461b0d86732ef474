// The Python module lowbit_cuda_emulated: calls of emulated_kernels.cpp for tests. It is never installed.
#include <dlfcn.h>
#include <pybind11/pybind11.h>

#include <cmath>
#include <vector>

#include "cuda/packed/decode.h"
#include "cuda/primitives.h"

namespace py = pybind11;

namespace {

using lowbit::DType;
namespace emulation = lowbit::cuda::emulation;

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
    find("lowbit_cuda_packed_decode_declines", declines_);
    find("lowbit_cuda_packed_decode_splits", splits_);
    find("lowbit_cuda_packed_decode", decode_);
  }

  int packed_decode(const py::dict& a) {
    lowbit::Linear<lowbit::packed::Weight> call{};
    lowbit::packed::Weight& w = call.weight;
    auto number = [&](const char* name) { return a[name].cast<int64_t>(); };
    begin_(static_cast<int>(number("order")));
    w.N = number("N"), w.K = number("K"), w.G = number("G"), w.group_size = number("group_size");
    w.bits = static_cast<int>(number("bits")), w.row_bytes = number("row_bytes");
    w.packed = reinterpret_cast<const uint8_t*>(array(a["packed"]));
    w.scales = array(a["scales"]), w.scales_dtype = dtype_of(a["scales_dtype"]);
    w.zeros = array(a["zeros"]), w.zeros_dtype = dtype_of(a["zeros_dtype"]);
    w.scales_row = w.zeros_row = number("scales_row"), w.scales_group = w.zeros_group = number("scales_group");
    w.per_tensor = number("per_tensor");
    w.outliers.values = array(a["outlier_values"]), w.outliers.dtype = dtype_of(a["outlier_dtype"]);
    w.outliers.columns = array(a["outlier_columns"]), w.outliers.wide = number("wide");
    w.outliers.rows = reinterpret_cast<const int32_t*>(array(a["outlier_rows"]));
    call.M = number("M"), call.x = array(a["x"]), call.dtype = dtype_of(a["dtype"]);
    call.bias = array(a["bias"]), call.bias_dtype = dtype_of(a["bias_dtype"]);
    call.int8 = number("int8");
    call.y = const_cast<char*>(array(a["y"]));
    if (const char* reason = declines_(&call)) throw py::value_error(reason);
    const int splits = splits_(&call, static_cast<int>(number("processors")));
    std::vector<float> parts(splits > 1 ? splits * call.M * w.N : 0, std::nanf(""));
    allow_(reinterpret_cast<const char*>(parts.data()), parts.size() * sizeof(float));
    return decode_(&call, parts.data(), splits, nullptr);
  }

 private:
  template <class Function>
  void find(const char* name, Function& function) {
    function = reinterpret_cast<Function>(dlsym(library_, name));
    if (function == nullptr) throw std::runtime_error(dlerror());
  }

  // The address of an array that the kernel may read or write, given as (address, bytes).
  const char* array(const py::object& given) {
    if (given.is_none()) return nullptr;
    const auto [address, bytes] = given.cast<std::pair<uintptr_t, size_t>>();
    allow_(reinterpret_cast<const char*>(address), bytes);
    return reinterpret_cast<const char*>(address);
  }

  void* library_;
  void (*begin_)(int);
  void (*allow_)(const char*, size_t);
  decltype(&lowbit_cuda_packed_decode_declines) declines_;
  decltype(&lowbit_cuda_packed_decode_splits) splits_;
  decltype(&lowbit_cuda_packed_decode) decode_;
};

}  // namespace

PYBIND11_MODULE(lowbit_cuda_emulated, m) {
  m.def("half_to_float", &emulation::half_to_float);
  m.def("float_to_half", &emulation::float_to_half);
  m.def("float_to_bfloat", &emulation::float_to_bfloat);
  py::class_<Kernels>(m, "Kernels")
      .def(py::init<std::string>())
      .def("packed_decode", &Kernels::packed_decode,
           "y = x @ W.T + bias: every argument by its name, arrays as (address, bytes). ValueError: the call is "
           "declined. RuntimeError: the kernel did something that a GPU would not survive.");
}
