#include "ops.h"

#include <algorithm>
#include <limits>
#include <string>
#include <vector>

#include "../common/arguments.h"
#include "../common/empty.h"
#include "cpu_kernel.h"

namespace lowbit {
namespace kron {
// Found by the type of its argument, so not in the unnamed namespace.
inline void prefetch_row(const Weight&, int64_t) {}  // all rows are made of the same factors

namespace {

constexpr int64_t kSharedElements = int64_t(8) << 20; // rows of x go through memory in blocks of about this size
constexpr int64_t kDotColumns = 128;                  // from here on a sum over lanes costs less than transposing
constexpr int64_t kDotColumnsBf16 = 512;              // of pairs: 1024 is 11 % faster at M = 256, 40 % slower at M = 1
constexpr int64_t kDotRows = 8;                       // or where so few rows use the transposed factor
constexpr int64_t kFewLanes = 16;

Factor check_factor(const char* op, const std::string& name, const Tensor& values, const OptionalTensor& scales,
                    const OptionalTensor& zeros, int64_t R, int64_t N, int64_t K, int64_t bits, int64_t group_size) {
  const std::string scales_name = name + "_scales", zeros_name = name + "_zeros";
  check_cpu(op, name.c_str(), values);
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

// The inverse of a permutation of [0, size).
std::vector<int32_t> check_permutation(const char* op, const char* name, const Tensor& t, int64_t size) {
  LOWBIT_CHECK(t.scalar_type() == ScalarType::Int, op, ": ", name, " must be int32: got ", dtype_name(t.scalar_type()));
  check_stored(op, name, t, size);
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

Checked check_weight(const char* op, const Tensor& a, const OptionalTensor& a_scales, const OptionalTensor& a_zeros,
                     const Tensor& b, const OptionalTensor& b_scales, const OptionalTensor& b_zeros,
                     const OptionalTensor& input_permutation, const OptionalTensor& output_permutation, int64_t rank,
                     int64_t n1, int64_t k1, int64_t n2, int64_t k2, int64_t a_bits, int64_t a_group_size,
                     int64_t b_bits, int64_t b_group_size) {
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
  w.a = check_factor(op, "a", a, a_scales, a_zeros, rank, n1, k1, a_bits, a_group_size);
  w.b = check_factor(op, "b", b, b_scales, b_zeros, rank, n2, k2, b_bits, b_group_size);
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

// Where element (left, right) of a pair of sizes [L, R] stands: in the other order when swapped, then permuted.
// Empty: where it is.
std::vector<int32_t> order_map(int64_t L, int64_t R, bool swapped, const std::vector<int32_t>& inverse) {
  std::vector<int32_t> map;
  swapped &= L > 1 && R > 1;
  if (!swapped && inverse.empty()) return map;
  map.resize(size_t(L * R));
  for (int64_t l = 0; l < L; ++l)
    for (int64_t r = 0; r < R; ++r) {
      const int64_t i = swapped ? r * L + l : l * R + r;
      map[size_t(l * R + r)] = inverse.empty() ? int32_t(i) : inverse[size_t(i)];
    }
  return map;
}

lowbit::CpuKernel<Weight> rows_kernel() {
  lowbit::CpuKernel<Weight> kernel{};
  kernel.dequantize = cpu_kernel(current_isa()).dequantize;
  return kernel;
}

}  // namespace

Tensor linear_cpu(Tensor x, Tensor a, OptionalTensor a_scales, OptionalTensor a_zeros, Tensor b,
                  OptionalTensor b_scales, OptionalTensor b_zeros, OptionalTensor bias,
                  OptionalTensor input_permutation, OptionalTensor output_permutation, int64_t rank, int64_t n1,
                  int64_t k1, int64_t n2, int64_t k2, int64_t a_bits, int64_t a_group_size, int64_t b_bits,
                  int64_t b_group_size) {
  const char* op = "kron_linear";
  check_cpu(op, "x", x);
  const DType dtype = check_float(op, "x", x.scalar_type());
  const Checked w = check_weight(op, a, a_scales, a_zeros, b, b_scales, b_zeros, input_permutation, output_permutation,
                                 rank, n1, k1, n2, k2, a_bits, a_group_size, b_bits, b_group_size);
  LOWBIT_CHECK(x.dim() >= 1 && x.size(x.dim() - 1) == w.K, op, ": x must be of shape [..., k1*k2 = ", w.K, "]: got ",
               shape_of(x));
  Linear call{};
  call.R = rank;
  // Which factor makes the inner loop: the larger, where it has many columns to sum over or the other has few lanes.
  const bool all_bf16 = dtype == DType::bf16 && w.a.dtype == DType::bf16 && w.b.dtype == DType::bf16;
  const int64_t dot_columns = all_bf16 && current_isa() == Isa::avx512bf16 ? kDotColumnsBf16 : kDotColumns;
  const bool swapped = n1 * k1 > n2 * k2 && (k1 >= dot_columns || n2 < kFewLanes || k2 < kFewLanes);
  call.left = swapped ? w.b : w.a;
  call.right = swapped ? w.a : w.b;
  const Factor &left = call.left, &right = call.right;
  call.right_first = left.K * right.N * (right.K + left.N) <= left.N * right.K * (left.K + right.N);
  call.dot = right.K >= dot_columns || (call.right_first ? left.K : left.N) < kDotRows;
  const std::vector<int32_t> source = order_map(left.K, right.K, swapped, w.input_inverse);
  const std::vector<int32_t> target = order_map(left.N, right.N, swapped, w.output_inverse);
  call.source = source.empty() ? nullptr : source.data();
  call.target = target.empty() ? nullptr : target.data();
  call.dtype = dtype;
  if (bias) {
    check_stored(op, "bias", *bias, w.N);
    call.bias_dtype = check_float(op, "bias", bias->scalar_type());
    call.bias = bias->const_data_ptr();
  }

  std::vector<int64_t> shape;
  int64_t M = 1;
  for (int64_t d = 0; d + 1 < x.dim(); ++d) {
    shape.push_back(x.size(d));
    M *= x.size(d);
  }
  shape.push_back(w.N);
  Tensor y = empty_cpu(shape, x.scalar_type());
  if (M == 0) return y;
  if (!x.is_contiguous()) x = torch::stable::contiguous(x);

  const int64_t row = call.right_first ? w.K : rank * left.N * right.K;  // of what is shared, per row of x
  const int64_t products = rank * right.K * (call.right_first ? left.K : left.N);
  const int64_t block = std::min(M, grain(kSharedElements, row));
  const CpuKernel& kernel = cpu_kernel(current_isa(), all_bf16);
  call.M = block;
  Scratch shared(Slot::prepared, size_t(kernel.shared_bytes(call)));
  kernel.prepare_constants(call, shared.data());
  const char* from = static_cast<const char*>(x.const_data_ptr());
  char* to = static_cast<char*>(y.mutable_data_ptr());
  for (int64_t m = 0; m < M; m += block) {
    call.M = std::min(block, M - m);
    call.x = from + m * w.K * element_size(dtype);
    call.y = to + m * w.N * element_size(dtype);
    torch::stable::parallel_for(0, call.M, grain(kTaskElements, std::max(w.K, row)), [&](int64_t m0, int64_t m1) {
      kernel.prepare(call, shared.data(), m0, m1);
    });
    const int64_t tasks = kernel.tasks(call), per_task = right.N * (products * call.M + kExpansion * right.K) / tasks;
    torch::stable::parallel_for(0, tasks, grain(kTaskProducts, per_task), [&](int64_t t0, int64_t t1) {
      kernel.linear(call, shared.data(), t0, t1);
    });
  }
  return y;
}

Tensor dequantize_cpu(Tensor a, OptionalTensor a_scales, OptionalTensor a_zeros, Tensor b, OptionalTensor b_scales,
                      OptionalTensor b_zeros, OptionalTensor input_permutation, OptionalTensor output_permutation,
                      int64_t rank, int64_t n1, int64_t k1, int64_t n2, int64_t k2, int64_t a_bits,
                      int64_t a_group_size, int64_t b_bits, int64_t b_group_size, ScalarType dtype) {
  const char* op = "kron_dequantize";
  const Weight w = check_weight(op, a, a_scales, a_zeros, b, b_scales, b_zeros, input_permutation, output_permutation,
                                rank, n1, k1, n2, k2, a_bits, a_group_size, b_bits, b_group_size);
  return run_dequantize(op, w, dtype, rows_kernel());
}

Tensor embedding_cpu(Tensor ids, Tensor a, OptionalTensor a_scales, OptionalTensor a_zeros, Tensor b,
                     OptionalTensor b_scales, OptionalTensor b_zeros, OptionalTensor input_permutation,
                     OptionalTensor output_permutation, int64_t rank, int64_t n1, int64_t k1, int64_t n2, int64_t k2,
                     int64_t a_bits, int64_t a_group_size, int64_t b_bits, int64_t b_group_size, ScalarType dtype) {
  const char* op = "kron_embedding";
  check_ids(op, ids);
  const Weight w = check_weight(op, a, a_scales, a_zeros, b, b_scales, b_zeros, input_permutation, output_permutation,
                                rank, n1, k1, n2, k2, a_bits, a_group_size, b_bits, b_group_size);
  return run_embedding(op, w, ids, dtype, rows_kernel());
}

}  // namespace kron
}  // namespace lowbit
