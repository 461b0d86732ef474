#include "cuda/ops/library.h"

#include <dlfcn.h>

#include <mutex>

// glibc 2.34 moved these functions into libc. By their older versions they are found there, and before that in libdl,
// which torch has loaded: manylinux_2_28 has it.
#if defined(__GLIBC__) && defined(__x86_64__)
__asm__(".symver dlopen, dlopen@GLIBC_2.2.5");
__asm__(".symver dlsym, dlsym@GLIBC_2.2.5");
__asm__(".symver dlerror, dlerror@GLIBC_2.2.5");
#elif defined(__GLIBC__) && defined(__aarch64__)
__asm__(".symver dlopen, dlopen@GLIBC_2.17");
__asm__(".symver dlsym, dlsym@GLIBC_2.17");
__asm__(".symver dlerror, dlerror@GLIBC_2.17");
#endif

namespace lowbit {
namespace cuda {
namespace {

const Library* opened = nullptr;
std::mutex mutex;

// From the libtorch_cuda that torch itself has loaded, if it has.
using CurrentStream = AOTITorchError (*)(int32_t, void**);

CurrentStream current_stream() {
  static const CurrentStream function = [] {
    void* const torch_cuda = dlopen("libtorch_cuda.so", RTLD_NOW | RTLD_NOLOAD);
    return torch_cuda == nullptr
               ? nullptr
               : reinterpret_cast<CurrentStream>(dlsym(torch_cuda, "aoti_torch_get_current_cuda_stream"));
  }();
  return function;
}

}  // namespace

std::string open_library(const std::string& path) {
  const std::lock_guard<std::mutex> lock(mutex);
  void* const handle = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (handle == nullptr) return dlerror();
  const auto function = reinterpret_cast<decltype(&lowbit_cuda_library)>(dlsym(handle, "lowbit_cuda_library"));
  if (function == nullptr) return path + " has no lowbit_cuda_library";
  if (function()->bytes != int64_t(sizeof(Library))) return path + " belongs to another version of lowbit";
  opened = function();
  return "";
}

const Library& library() {
  LOWBIT_CHECK(opened != nullptr, "the CUDA kernels have not been loaded: the library liblowbit_cuda.so is needed");
  return *opened;
}

const Device& device_of(const Tensor& t) {
  constexpr int kMost = 64;
  static Device devices[kMost];
  static bool known[kMost];
  const int index = t.is_cuda() ? t.get_device_index() : 0;
  LOWBIT_CHECK(index >= 0 && index < kMost, "the CUDA kernels know GPUs 0 to ", kMost - 1, ": got cuda:", index);
  const std::lock_guard<std::mutex> lock(mutex);
  if (!known[index]) {
    const int error = library().device(index, devices[index]);
    LOWBIT_CHECK(error == 0, "CUDA error ", error, " (", library().error(error), ") of cuda:", index);
    known[index] = true;
  }
  return devices[index];
}

void* stream_of(const Tensor& t) {
  if (!t.is_cuda()) return nullptr;
  LOWBIT_CHECK(current_stream() != nullptr, "this torch has no CUDA: libtorch_cuda.so is not loaded");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(current_stream()(t.get_device_index(), &stream));
  return stream;
}

}  // namespace cuda
}  // namespace lowbit
