// The element types kernels read and write.
#pragma once
#include <cstdint>

namespace lowbit {

enum class DType : uint8_t { none, f32, f16, bf16, u8 };

inline int64_t element_size(DType t) { return t == DType::f32 ? 4 : t == DType::u8 ? 1 : 2; }

}  // namespace lowbit
