// A bump allocator over one scratch buffer. The first pass (base null) counts bytes, the second hands them out.
#pragma once
#include "cpu/scratch.h"
#include "cpu/simd.h"

namespace lowbit {
namespace {

class Arena {
 public:
  explicit Arena(void* base) : base_(static_cast<char*>(base)) {}
  template <class T>
  T* take(int64_t count) {
    T* p = base_ ? reinterpret_cast<T*>(base_ + used_) : nullptr;
    used_ += round_up(count * int64_t(sizeof(T)), 64);
    return p;
  }
  bool counting() const { return !base_; }
  int64_t used() const { return used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};

}  // namespace
}  // namespace lowbit
