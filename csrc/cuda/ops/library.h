// liblowbit_cuda.so for the ops of this folder: opening it, and what its calls need of torch. Nothing here links
// against CUDA or against torch's part of it.
#pragma once
#include <string>
#include <type_traits>
#include <vector>

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>

#include "common/arguments.h"
#include "common/empty.h"
#include "cuda/library.h"
#include "cuda/rows.h"
#include "cuda/stack.h"

namespace lowbit {
namespace cuda {

// Opens a library, once; the reason why it cannot be used, or "".
std::string open_library(const std::string& path);

// The open library. Raises where there is none.
const Library& library();

// The GPU of a tensor; of one on the CPU, the one that emulated kernels take it for.
const Device& device_of(const Tensor& t);

// torch's current stream on the GPU of a tensor
void* stream_of(const Tensor& t);

// Sets the current device for the time of a call.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& t) {
    if (t.is_cuda()) guard_.emplace(t.get_device_index());
  }

 private:
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
};

inline Tensor empty_beside(const Tensor& t, const std::vector<int64_t>& shape, ScalarType dtype) {
  int32_t type = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(t.get(), &type));
  return empty(shape, dtype, type, t.is_cuda() ? t.get_device_index() : -1);
}

// Every op is there twice: as the op, whose Result is a Tensor, and as the question why it is declined, whose Result is
// a text, "" where it is not. `put` puts the result's address into the call; the result is to be beside `t`.
template <class Result, class Call, class Put>
Result answer(const Caller& op, const Op<Call>& kernels, Call& call, const Tensor& t,
              const std::vector<int64_t>& shape, ScalarType dtype, Put put) {
  const Device& device = device_of(t);
  const char* const reason = kernels.declines(call, device);
  if constexpr (std::is_same_v<Result, std::string>) {
    return reason == nullptr ? "" : reason;
  } else {
    LOWBIT_CHECK(reason == nullptr, op, ": the CUDA kernels decline this call: ", reason);
    const OnDevice on(t);
    Tensor out = empty_beside(t, shape, dtype);
    put(out.mutable_data_ptr());
    const int64_t bytes = kernels.workspace_bytes(call, device);
    std::optional<Tensor> workspace;  // torch keeps its memory until the stream has passed this call
    if (bytes > 0) workspace = empty_beside(t, {bytes}, ScalarType::Byte);
    const int error = kernels.run(call, device, workspace ? workspace->mutable_data_ptr() : nullptr, stream_of(t));
    LOWBIT_CHECK(error == 0, op, ": CUDA error ", error, " (", library().error(error), ")");
    return out;
  }
}

// The answer where no kernel reads the arguments, whatever the library says.
template <class Result>
Result declined(const Caller& op, const char* reason) {
  if constexpr (std::is_same_v<Result, std::string>) {
    return reason;
  } else {
    LOWBIT_CHECK(false, op, ": the CUDA kernels decline this call: ", reason);
    std::abort();
  }
}

// Sets M, x and the dtype of a product; the shape of its result. Who only asks copies nothing.
template <class Result, class Weight>
std::vector<int64_t> set_x(Linear<Weight>& call, Tensor& x) {
  std::vector<int64_t> shape;
  call.M = 1;
  for (int64_t d = 0; d + 1 < x.dim(); ++d) {
    shape.push_back(x.size(d));
    call.M *= x.size(d);
  }
  shape.push_back(call.weight.N);
  if (std::is_same_v<Result, Tensor> && !x.is_contiguous()) x = torch::stable::contiguous(x);
  call.dtype = float_dtype(x.scalar_type());
  call.x = x.const_data_ptr();
  return shape;
}

// Sets what of a call x and ids say; the shape of its result, [S, N].
template <class Result, class Weight>
std::vector<int64_t> set_ids(const Caller& op, Experts<Weight>& call, Tensor& x, Tensor& ids, int64_t num_experts) {
  const int64_t rows = call.linear.weight.N;
  LOWBIT_CHECK(num_experts >= 1 && rows % num_experts == 0, op, ": num_experts must divide the rows of the weight, ",
               rows, ": got num_experts=", num_experts);
  LOWBIT_CHECK(x.dim() == 2, op, ": x must be of shape [T, K]: got ", shape_of(x));
  check_ids(op, ids);
  const int64_t T = x.size(0), S = ids.numel();
  LOWBIT_CHECK(ids.dim() == 1 && (T == 0 ? S == 0 : S % T == 0), op, ": ids must be of shape [S], S a multiple of T=", T,
               ": got ", shape_of(ids));
  set_x<Result>(call.linear, x);
  if (std::is_same_v<Result, Tensor> && !ids.is_contiguous()) ids = torch::stable::contiguous(ids);
  call.ids = ids.const_data_ptr();
  call.wide = ids.scalar_type() == ScalarType::Long;
  call.S = S, call.E = num_experts;
  return {S, rows / num_experts};
}

// out[...] = W[ids[...]], of `dtype`; without ids, all rows of W, whose codes are `codes`.
template <class Result, class Weight>
Result answer_rows(const Caller& op, const Op<Rows<Weight>>& kernels, const Weight& weight, const Tensor* ids,
                   const Tensor& codes, ScalarType dtype) {
  Rows<Weight> call{};
  call.weight = weight;
  call.dtype = check_float(op, "dtype", dtype);
  call.count = weight.N;
  std::vector<int64_t> shape{weight.N, weight.K};
  std::optional<Tensor> contiguous;
  if (ids != nullptr) {
    check_ids(op, *ids);
    const bool copied = std::is_same_v<Result, Tensor> && !ids->is_contiguous();
    contiguous = copied ? torch::stable::contiguous(*ids) : *ids;
    call.ids = contiguous->const_data_ptr();
    call.wide = ids->scalar_type() == ScalarType::Long;
    call.count = ids->numel();
    shape.clear();
    for (int64_t d = 0; d < ids->dim(); ++d) shape.push_back(ids->size(d));
    shape.push_back(weight.K);
  }
  return answer<Result>(op, kernels, call, codes, shape, dtype, [&](void* out) { call.out = out; });
}

}  // namespace cuda
}  // namespace lowbit
