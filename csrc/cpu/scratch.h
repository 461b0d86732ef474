// Working memory of a kernel call: 64-byte aligned, kept per thread while small.
#pragma once
#include <cstddef>

namespace lowbit {

// Two independent buffers per thread: the caller's (activations prepared once per call) and the
// worker's (the caller's thread works too, and must not overwrite what it prepared).
enum class Slot { prepared, worker };

constexpr size_t kScratchKept = size_t(4) << 20;  // larger buffers live for one call only

class Scratch {
 public:
  Scratch(Slot slot, size_t bytes);
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  void* data() const { return data_; }

 private:
  void* data_;
  bool owned_;
};

}  // namespace lowbit
