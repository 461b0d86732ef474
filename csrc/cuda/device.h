// What launches ask of a GPU.
#pragma once

namespace lowbit {
namespace cuda {

struct Device {
  int architecture;  // 10 * major + minor of its compute capability
  int processors;
  int shared_bytes;  // of shared memory, the most that a block may ask for
};

}  // namespace cuda
}  // namespace lowbit
