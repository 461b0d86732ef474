// The op of namespace `lowbit_native` that the quantizers of the family `codebook` use: lowbit/codebook/kmeans.py.
#pragma once
#include <optional>

#include <torch/csrc/stable/tensor.h>

namespace lowbit {
namespace codebook {

// Centroids, float32 [R, clusters], of least squared error for every row of x, float32 [R, n] (see kmeans.h)
torch::stable::Tensor kmeans_optimal_cpu(torch::stable::Tensor x, std::optional<torch::stable::Tensor> weights,
                                         int64_t clusters, int64_t choices);

}  // namespace codebook
}  // namespace lowbit
