// Argument checks of the torch-facing side. A failed check throws std::runtime_error (RuntimeError in Python).
#pragma once
#include <sstream>
#include <stdexcept>
#include <string>

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include "common/dtype.h"

// LOWBIT_CHECK(condition, parts of the message...): requirement first, then the value that broke it.
#define LOWBIT_CHECK(condition, ...)                                              \
  do {                                                                            \
    if (!(condition)) throw std::runtime_error(::lowbit::message(__VA_ARGS__));   \
  } while (0)

namespace lowbit {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class... Parts>
std::string message(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

inline std::string shape_of(const Tensor& t) {
  std::ostringstream out;
  out << "[";
  for (int64_t d = 0; d < t.dim(); ++d) out << (d ? ", " : "") << t.size(d);
  out << "]";
  return out.str();
}

inline std::string dtype_name(ScalarType t) { return torch::headeronly::toString(t); }

// float32, float16 or bfloat16; none when it is another type
inline DType float_dtype(ScalarType t) {
  switch (t) {
    case ScalarType::Float: return DType::f32;
    case ScalarType::Half: return DType::f16;
    case ScalarType::BFloat16: return DType::bf16;
    default: return DType::none;
  }
}

// Whose arguments are checked: an op, by its name, and where its tensors must be.
struct Caller {
  const char* op;
  int32_t gpu = -1;    // which one; -1: the CPU
  bool tiles = false;  // its kernels read codes in tiles, and nothing here waits for values

  Caller(const char* name) : op(name) {}
  Caller(const char* name, const Tensor& beside) : op(name), gpu(beside.is_cuda() ? beside.get_device_index() : -1),
                                                   tiles(true) {}
};

inline std::ostream& operator<<(std::ostream& out, const Caller& caller) { return out << caller.op; }

inline DType check_float(const Caller& op, const char* name, ScalarType t) {
  const DType dtype = float_dtype(t);
  LOWBIT_CHECK(dtype != DType::none, op, ": ", name, " must be float32, float16 or bfloat16: got ", dtype_name(t));
  return dtype;
}

inline void check_device(const Caller& op, const char* name, const Tensor& t) {
  const bool here = op.gpu < 0 ? t.is_cpu() : t.is_cuda() && t.get_device_index() == op.gpu;
  LOWBIT_CHECK(here, op, ": ", name, " must be on ", op.gpu < 0 ? "the CPU" : message("cuda:", op.gpu),
               " like the other arguments");
}

// A tensor of shape [rows, columns] (columns < 0: of shape [rows]).
inline void check_shape(const Caller& op, const char* name, const Tensor& t, int64_t rows, int64_t columns = -1) {
  check_device(op, name, t);
  const bool matches = columns < 0 ? t.dim() == 1 && t.size(0) == rows
                                   : t.dim() == 2 && t.size(0) == rows && t.size(1) == columns;
  if (!matches) {
    const std::string expected = columns < 0 ? message("[", rows, "]") : message("[", rows, ", ", columns, "]");
    LOWBIT_CHECK(false, op, ": ", name, " must be of shape ", expected, ": got ", shape_of(t));
  }
}

// The same, contiguous: a stored tensor.
inline void check_stored(const Caller& op, const char* name, const Tensor& t, int64_t rows, int64_t columns = -1) {
  check_shape(op, name, t, rows, columns);
  LOWBIT_CHECK(t.is_contiguous(), op, ": ", name, " must be contiguous");
}

}  // namespace lowbit
