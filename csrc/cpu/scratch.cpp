#include "cpu/scratch.h"

#include <cstdlib>
#include <new>

namespace lowbit {
namespace {

void* allocate(size_t bytes) {
  void* p = std::aligned_alloc(64, (bytes + 63) / 64 * 64);
  if (!p) throw std::bad_alloc();
  return p;
}

struct Kept {
  void* data = nullptr;
  size_t bytes = 0;
  ~Kept() { std::free(data); }
};

thread_local Kept kept[2];

}  // namespace

Scratch::Scratch(Slot slot, size_t bytes) : owned_(bytes > kScratchKept) {
  if (bytes == 0) bytes = 64;
  if (owned_) {
    data_ = allocate(bytes);
    return;
  }
  Kept& k = kept[slot == Slot::worker];
  if (k.bytes < bytes) {
    std::free(k.data);
    k.data = nullptr;
    k.bytes = 0;
    k.data = allocate(bytes);
    k.bytes = bytes;
  }
  data_ = k.data;
}

Scratch::~Scratch() {
  if (owned_) std::free(data_);
}

}  // namespace lowbit
