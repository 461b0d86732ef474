// New tensors, from torch's allocator directly. torch::stable::new_empty looks its op up by name at every call, which
// takes longer than a small product.
#pragma once
#include <algorithm>
#include <vector>

#include <torch/csrc/stable/stableivalue_conversions.h>
#include <torch/csrc/stable/tensor.h>

namespace lowbit {

// A contiguous tensor; its values are not set
inline torch::stable::Tensor empty(const std::vector<int64_t>& shape, torch::headeronly::ScalarType dtype,
                                   int32_t device_type, int32_t device_index) {
  std::vector<int64_t> strides(shape.size());
  int64_t stride = 1;
  for (size_t d = shape.size(); d-- > 0; stride *= std::max<int64_t>(1, shape[d])) strides[d] = stride;
  namespace stable = torch::stable::detail;
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      int64_t(shape.size()), shape.data(), strides.data(), stable::to<int32_t>(stable::from(dtype)),
      device_type, device_index, &handle));
  return torch::stable::Tensor(handle);
}

inline torch::stable::Tensor empty_cpu(const std::vector<int64_t>& shape, torch::headeronly::ScalarType dtype) {
  return empty(shape, dtype, aoti_torch_device_type_cpu(), -1);
}

}  // namespace lowbit
