// What the library says of GPUs and of itself.
#pragma once
#include "cuda/device.h"
#include "cuda/primitives.h"

#ifndef LOWBIT_EMULATED
namespace lowbit {
namespace cuda {

inline int read_device(int index, Device& device) {
  int major = 0, minor = 0;
  const auto read = [&](int& value, cudaDeviceAttr what) { return cudaDeviceGetAttribute(&value, what, index); };
  cudaError_t error = read(major, cudaDevAttrComputeCapabilityMajor);
  if (error == cudaSuccess) error = read(minor, cudaDevAttrComputeCapabilityMinor);
  if (error == cudaSuccess) error = read(device.processors, cudaDevAttrMultiProcessorCount);
  if (error == cudaSuccess) error = read(device.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  device.architecture = 10 * major + minor;
  return static_cast<int>(error);
}

#define LOWBIT_TEXT(...) #__VA_ARGS__
#define LOWBIT_TEXT_OF(...) LOWBIT_TEXT(__VA_ARGS__)
inline constexpr const char* ARCHITECTURES = LOWBIT_TEXT_OF(LOWBIT_ARCHITECTURES);  // setup.py's: "800,900"

inline const char* error_text(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }

}  // namespace cuda
}  // namespace lowbit
#endif
