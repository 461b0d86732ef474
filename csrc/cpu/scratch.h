// Working memory of a kernel call: 64-byte aligned, kept per thread while small.
#pragma once
#include <cstddef>

#include "cpu/tuning.h"

namespace lowbit {

// Each thread has two buffers: `prepared` for the activations of a call, `worker` for its tasks. The calling thread
// also works, and must not overwrite what it prepared.
enum class Slot { prepared, worker };

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
