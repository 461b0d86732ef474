// The arguments of the ops of the family `kron` (declared in lowbit/kron/op.py), checked and turned into an operand.
#pragma once
#include <limits>
#include <string>
#include <vector>

#include "common/arguments.h"
#include "common/kron.h"

namespace lowbit {
namespace kron {

// A factor's part of an op's arguments.
struct FactorArguments {
  const Tensor& values;
  const OptionalTensor &scales, &zeros;
  int64_t bits, group_size;
};

// The weight's part of them.
struct WeightArguments {
  FactorArguments a, b;
  const OptionalTensor &input_permutation, &output_permutation;
  int64_t rank, n1, k1, n2, k2;
};

inline Factor check_factor(const Caller& op, const std::string& name, const FactorArguments& arguments, int64_t R,
                           int64_t N, int64_t K) {
  const auto& [values, scales, zeros, bits, group_size] = arguments;
  const std::string scales_name = name + "_scales", zeros_name = name + "_zeros";
  check_device(op, name.c_str(), values);
  LOWBIT_CHECK(bits == 0 || (bits >= 2 && bits <= 8), op, ": ", name,
               "_bits must be between 2 and 8, or 0 for a dense factor: got ", name, "_bits=", bits);
  Factor f{};
  f.N = N;
  f.K = K;
  if (bits == 0) {
    f.dtype = check_float(op, name.c_str(), values.scalar_type());
    LOWBIT_CHECK(values.dim() == 3 && values.size(0) == R && values.size(1) == N && values.size(2) == K, op, ": ", name,
                 " must be of shape [", R, ", ", N, ", ", K, "]: got ", shape_of(values));
    LOWBIT_CHECK(values.is_contiguous(), op, ": ", name, " must be contiguous");
    LOWBIT_CHECK(!scales && !zeros, op, ": ", scales_name, " and ", zeros_name, " belong to a packed factor: got ",
                 name, "_bits=0");
    f.values = values.const_data_ptr();
    return f;
  }
  LOWBIT_CHECK(group_size >= 1 && group_size <= K, op, ": ", name, "_group_size must be between 1 and ", K, ": got ",
               group_size);
  LOWBIT_CHECK(values.scalar_type() == ScalarType::Int, op, ": ", name, " must be int32 when packed: got ",
               dtype_name(values.scalar_type()));
  LOWBIT_CHECK(scales.has_value(), op, ": ", scales_name, " must be given for a packed factor: got ", name,
               "_bits=", bits);
  const int64_t words = ((K - 1) / 32 + 1) * bits;
  check_stored(op, name.c_str(), values, R * N, words);
  f.dtype = DType::none;
  f.values = values.const_data_ptr();
  f.bits = int(bits);
  f.row_bytes = words * 4;
  f.total_bytes = R * N * f.row_bytes;
  f.group_size = group_size;
  f.G = (K - 1) / group_size + 1;
  f.per_tensor = f.G == 1 && R * N != 1 && scales->dim() == 2 && scales->size(0) == 1;
  const int64_t rows = f.per_tensor ? 1 : R * N;
  check_stored(op, scales_name.c_str(), *scales, rows, f.G);
  f.scales_dtype = check_float(op, scales_name.c_str(), scales->scalar_type());
  f.scales = scales->const_data_ptr();
  if (zeros) {
    check_stored(op, zeros_name.c_str(), *zeros, rows, f.G);
    const ScalarType dtype = zeros->scalar_type();
    LOWBIT_CHECK(dtype == ScalarType::Byte || dtype == scales->scalar_type(), op, ": ", zeros_name,
                 " must be uint8 or of the dtype of ", scales_name, " (", dtype_name(scales->scalar_type()), "): got ",
                 dtype_name(dtype));
    f.zeros_dtype = dtype == ScalarType::Byte ? DType::u8 : f.scales_dtype;
    f.zeros = zeros->const_data_ptr();
  }
  return f;
}

// The inverse of a permutation of [0, size); empty where nothing waits for values.
inline std::vector<int32_t> check_permutation(const Caller& op, const char* name, const Tensor& t, int64_t size) {
  LOWBIT_CHECK(t.scalar_type() == ScalarType::Int, op, ": ", name, " must be int32: got ", dtype_name(t.scalar_type()));
  check_stored(op, name, t, size);
  if (op.tiles) return {};
  const int32_t* p = static_cast<const int32_t*>(t.const_data_ptr());
  std::vector<int32_t> inverse(size_t(size), -1);
  for (int64_t i = 0; i < size; ++i) {
    LOWBIT_CHECK(p[i] >= 0 && p[i] < size, op, ": ", name, " must hold numbers from 0 to ", size - 1, ": got ", p[i]);
    LOWBIT_CHECK(inverse[size_t(p[i])] < 0, op, ": ", name, " must hold every number once: got ", p[i], " twice");
    inverse[size_t(p[i])] = int32_t(i);
  }
  return inverse;
}

struct Checked : Weight {
  std::vector<int32_t> input_inverse, output_inverse;  // empty: the identity
};

inline Checked check_weight(const Caller& op, const WeightArguments& arguments) {
  const auto& [a, b, input_permutation, output_permutation, rank, n1, k1, n2, k2] = arguments;
  const struct {
    const char* name;
    int64_t value;
  } sizes[] = {{"rank", rank}, {"n1", n1}, {"k1", k1}, {"n2", n2}, {"k2", k2}};
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  for (const auto& size : sizes)
    LOWBIT_CHECK(size.value >= 1 && size.value <= kMost, op, ": ", size.name, " must be between 1 and 2^31 - 1: got ",
                 size.value);
  LOWBIT_CHECK(n1 <= kMost / n2 && k1 <= kMost / k2, op,
               ": n1*n2 and k1*k2 must be below 2^31: got n1=", n1, ", n2=", n2, ", k1=", k1, ", k2=", k2);
  LOWBIT_CHECK(rank <= kMost / n1 && rank <= kMost / n2, op, ": rank*n1 and rank*n2 must be below 2^31: got rank=",
               rank, ", n1=", n1, ", n2=", n2);
  Checked w{};
  w.R = rank;
  w.N = n1 * n2;
  w.K = k1 * k2;
  w.a = check_factor(op, "a", a, rank, n1, k1);
  w.b = check_factor(op, "b", b, rank, n2, k2);
  if (input_permutation) {
    w.input_inverse = check_permutation(op, "input_permutation", *input_permutation, w.K);
    w.input_permutation = static_cast<const int32_t*>(input_permutation->const_data_ptr());
  }
  if (output_permutation) {
    w.output_inverse = check_permutation(op, "output_permutation", *output_permutation, w.N);
    w.output_permutation = static_cast<const int32_t*>(output_permutation->const_data_ptr());
  }
  return w;
}

}  // namespace kron
}  // namespace lowbit
