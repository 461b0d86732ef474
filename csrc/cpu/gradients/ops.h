// The ops of namespace `lowbit_native` that gradients use: lowbit/backends/gradients.py.
#pragma once
#include <optional>

#include <torch/csrc/stable/tensor.h>

namespace lowbit {
namespace gradients {

// float32 [N, G or 1, 2**bits]: d, float32 [N, K], times scales, float32 [N, G], summed over the columns of each code;
// `grouped`: in each group of columns, else in a row. Without d: how many columns have a code
torch::stable::Tensor sums_by_code_cpu(std::optional<torch::stable::Tensor> d, torch::stable::Tensor packed,
                                       std::optional<torch::stable::Tensor> scales, int64_t bits, int64_t in_features,
                                       int64_t group_size, bool grouped);

// float32 [nnz]: dy, [M, N], times x, [M, K], at the places of outliers: sum_m dy[m, row] * x[m, column]
torch::stable::Tensor sampled_products_cpu(torch::stable::Tensor dy, torch::stable::Tensor x,
                                           torch::stable::Tensor outlier_values, torch::stable::Tensor outlier_columns,
                                           torch::stable::Tensor outlier_rows);

}  // namespace gradients
}  // namespace lowbit
