// What the kernels of this folder ask of a GPU, one small function each: here as PTX, in emulated/emulation.h as C++
// that runs on the CPU. A kernel uses nothing else of CUDA, so that one source serves both.
#pragma once
#include <cstdint>

#include "common/dtype.h"

#define LOWBIT_UNROLL _Pragma("unroll")

#ifdef LOWBIT_EMULATED
#include "cuda/emulated/emulation.h"
#else
#include <cuda_runtime.h>

#define LOWBIT_DEVICE __device__ __forceinline__
#define LOWBIT_KERNEL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)

namespace lowbit {
namespace cuda {

using Stream = cudaStream_t;
using Words2 = uint2;
using Words4 = uint4;

LOWBIT_DEVICE int thread_index() { return threadIdx.x; }
LOWBIT_DEVICE int block_index() { return blockIdx.x; }

// __syncthreads()
LOWBIT_DEVICE void barrier() { __syncthreads(); }

// ------------------------------------------------------------------------------------------------------ global memory

template <class T>
LOWBIT_DEVICE T load(const T* at) {
  return __ldg(at);
}

// For weights, which are read once: they leave the first-level cache to x.
LOWBIT_DEVICE Words4 load_once(const Words4* at) {
  Words4 v;
  asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(at));
  return v;
}

LOWBIT_DEVICE Words2 load_once(const Words2* at) {
  Words2 v;
  asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(at));
  return v;
}

template <class T>
LOWBIT_DEVICE void store(T* at, T value) {
  *at = value;
}

// ------------------------------------------------------------------------------------------------------ shared memory
// Addresses are bytes from the start of the block's dynamic shared memory.

extern __shared__ __align__(128) char lowbit_shared[];

LOWBIT_DEVICE Words4 load_shared4(int at) { return *reinterpret_cast<const Words4*>(lowbit_shared + at); }
LOWBIT_DEVICE float load_shared(int at) { return *reinterpret_cast<const float*>(lowbit_shared + at); }
LOWBIT_DEVICE void store_shared(int at, float value) { *reinterpret_cast<float*>(lowbit_shared + at) = value; }
LOWBIT_DEVICE void store_shared(int at, Words2 value) { *reinterpret_cast<Words2*>(lowbit_shared + at) = value; }
LOWBIT_DEVICE void store_shared(int at, uint16_t value) { *reinterpret_cast<uint16_t*>(lowbit_shared + at) = value; }

LOWBIT_DEVICE Words2 load_shared2(int at) { return *reinterpret_cast<const Words2*>(lowbit_shared + at); }

LOWBIT_DEVICE uint32_t load_shared_word(int at) { return *reinterpret_cast<const uint32_t*>(lowbit_shared + at); }

LOWBIT_DEVICE uint16_t load_shared_half(int at) { return *reinterpret_cast<const uint16_t*>(lowbit_shared + at); }

LOWBIT_DEVICE void store_shared4(int at, Words4 value) { *reinterpret_cast<Words4*>(lowbit_shared + at) = value; }

// Begins to copy 16 bytes, or to write 16 zeros.
LOWBIT_DEVICE void copy_async(int to, const void* from, bool zeros) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(lowbit_shared + to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(zeros ? 0 : 16)
               : "memory");
}

// Begins to copy 8 bytes.
LOWBIT_DEVICE void copy_async8(int to, const void* from) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(lowbit_shared + to));
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(address), "l"(from) : "memory");
}

LOWBIT_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until at most PENDING of the groups that this thread has committed are on their way.
template <int PENDING>
LOWBIT_DEVICE void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// --------------------------------------------------------------------------------------------------------- arithmetic
// A pair is two numbers of 16 bits in a word, the first one low.

LOWBIT_DEVICE uint32_t bits_of(float value) { return __float_as_uint(value); }
LOWBIT_DEVICE float float_of(uint32_t bits) { return __uint_as_float(bits); }

// The bytes of a that the four digits of `which` number, the lowest first.
LOWBIT_DEVICE uint32_t select_bytes(uint32_t a, uint32_t which) { return __byte_perm(a, 0, which); }

// (a & mask) | b, one instruction
LOWBIT_DEVICE uint32_t masked_or(uint32_t a, uint32_t mask, uint32_t b) {
  uint32_t d;
  asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(d) : "r"(a), "r"(mask), "r"(b));
  return d;
}

LOWBIT_DEVICE uint32_t multiply_high(uint32_t a, uint32_t b) { return __umulhi(a, b); }
LOWBIT_DEVICE float fused_multiply_add(float a, float b, float c) { return __fmaf_rn(a, b, c); }

// Rounded, whatever is added to it.
LOWBIT_DEVICE float multiply(float a, float b) { return __fmul_rn(a, b); }

// The upper halves of two words, the first one low.
LOWBIT_DEVICE uint32_t upper_halves(uint32_t a, uint32_t b) { return __byte_perm(a, b, 0x7632); }

LOWBIT_DEVICE float not_a_number() { return __uint_as_float(0x7FFFFFFFu); }

// Byte n is the one of the eight bytes of a (0-3) and b (4-7) that nibble n of `codes` says. No nibble may be above 7.
LOWBIT_DEVICE uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t codes) { return __byte_perm(a, b, codes); }

template <DType T>
LOWBIT_DEVICE uint32_t subtract_pair(uint32_t a, uint32_t b) {
  uint32_t d;
  if constexpr (T == DType::f16)
    asm("sub.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  else  // a subtraction of bfloat16 needs sm_90
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(b), "r"(0xBF80BF80u), "r"(a));
  return d;
}

// a * b + c, rounded once
template <DType T>
LOWBIT_DEVICE uint32_t multiply_add_pair(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d;
  if constexpr (T == DType::f16)
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  else
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}

// The same number; the compiler does not know which.
LOWBIT_DEVICE int opaque(int value) {
  asm volatile("" : "+r"(value));
  return value;
}

LOWBIT_DEVICE uint32_t opaque(uint32_t value) {
  asm volatile("" : "+r"(value));
  return value;
}

LOWBIT_DEVICE const char* opaque(const char* at) {
  asm volatile("" : "+l"(at));
  return at;
}

template <DType T>
LOWBIT_DEVICE float to_float(uint16_t bits) {
  if constexpr (T == DType::bf16) return __uint_as_float(uint32_t(bits) << 16);
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
}

template <DType T>
LOWBIT_DEVICE uint16_t from_float(float value) {
  uint16_t bits;
  if constexpr (T == DType::f16)
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  else
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}

// sums [16, 8] += a [16, 16] @ b [16, 8], float32 sums. Of thread 4g + t: a0, a2 are columns 2t and 2t + 8 (and the
// next) of row g, a1 and a3 of row g + 8; b0, b1 are rows 2t and 2t + 8 (and the next) of column g; sums are columns 2t
// and 2t + 1 of row g, then of row g + 8.
template <DType T>
LOWBIT_DEVICE void multiply_matrices(float (&sums)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                     uint32_t b1) {
  if constexpr (T == DType::f16)
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  else
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// sums [16, 8] += a [16, 32] @ b [32, 8], bytes without and with a sign, int32 sums. Of thread 4g + t: a0, a2 are columns
// 4t and 4t + 16 (and the next three) of row g, a1 and a3 of row g + 8; b0, b1 are rows 4t and 4t + 16 (and the next
// three) of column g; sums are columns 2t and 2t + 1 of row g, then of row g + 8.
LOWBIT_DEVICE void multiply_bytes(int32_t (&sums)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                  uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+r"(sums[0]), "+r"(sums[1]), "+r"(sums[2]), "+r"(sums[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// ------------------------------------------------------------------------------------------------------------ the host

// Starts `kernel` on a stream; CUDA's error code, 0 for none.
template <class... Parameters, class... Arguments>
int launch(void (*kernel)(Parameters...), int blocks, int threads, int shared_bytes, Stream stream,
           Arguments... arguments) {
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (error == cudaSuccess) {
    kernel<<<blocks, threads, shared_bytes, stream>>>(static_cast<Parameters>(arguments)...);
    error = cudaGetLastError();
  }
  return static_cast<int>(error);
}

}  // namespace cuda
}  // namespace lowbit
#endif
