#include "cpu/codebook/quantize_ops.h"

#include <limits>
#include <vector>

#include <torch/csrc/stable/ops.h>

#include "common/checks.h"
#include "cpu/codebook/kmeans.h"

namespace lowbit {
namespace codebook {

Tensor kmeans_optimal_cpu(Tensor x, std::optional<Tensor> weights, int64_t clusters, int64_t choices) {
  const char* op = "kmeans_optimal";
  LOWBIT_CHECK(x.dim() == 2 && x.size(1) >= 1, op, ": x must be of shape [R, n], n >= 1: got ", shape_of(x));
  const int64_t rows = x.size(0), n = x.size(1);
  LOWBIT_CHECK(x.scalar_type() == ScalarType::Float, op, ": x must be float32: got ", dtype_name(x.scalar_type()));
  LOWBIT_CHECK(clusters >= 1 && clusters <= 256, op, ": clusters must be between 1 and 256: got ", clusters);
  LOWBIT_CHECK(n < std::numeric_limits<uint32_t>::max(), op, ": a row must have less than 2**32 values: got ", n);
  check_stored(op, "x", x, rows, n);
  if (weights) {
    check_stored(op, "weights", *weights, rows, n);
    LOWBIT_CHECK(weights->scalar_type() == ScalarType::Float, op, ": weights must be float32: got ",
                 dtype_name(weights->scalar_type()));
  }
  const std::vector<int64_t> shape{rows, clusters};
  Tensor out = torch::stable::new_empty(x, shape);
  const float* values = static_cast<const float*>(x.const_data_ptr());
  const float* h = weights ? static_cast<const float*>(weights->const_data_ptr()) : nullptr;
  float* centroids = static_cast<float*>(out.mutable_data_ptr());
  // One level of threads: over the rows, or inside the only one.
  const Parallel parallel = [&](int64_t count, const std::function<void(int64_t, int64_t)>& body) {
    torch::stable::parallel_for(0, count, 1, body);
  };
  const Parallel serial = [](int64_t count, const std::function<void(int64_t, int64_t)>& body) { body(0, count); };
  const auto row = [&](int64_t r, const Parallel& inside) {
    kmeans_optimal(values + r * n, h ? h + r * n : nullptr, n, clusters, centroids + r * clusters, choices,
                   inside);
  };
  if (rows == 1) {
    row(0, parallel);
  } else {
    torch::stable::parallel_for(0, rows, 1, [&](int64_t r0, int64_t r1) {
      for (int64_t r = r0; r < r1; ++r) row(r, serial);
    });
  }
  return out;
}

}  // namespace codebook
}  // namespace lowbit
