// What kernels of sm_90a ask of a GPU beside primitives.h: copies of boxes by the tensor memory accelerator, mbarriers,
// and products of warpgroups. There is no emulation in C++: lowbit/testing/ptx_emulator executes the compiled PTX.
#pragma once
#include <cuda.h>

#include "cuda/primitives.h"

namespace lowbit {
namespace cuda {

// The address, in shared memory, of what lies so many bytes behind the first multiple of 1024 of dynamic shared memory:
// the pattern by which a box is swizzled repeats there.
LOWBIT_DEVICE uint32_t shared_address(int at) {
  return ((static_cast<uint32_t>(__cvta_generic_to_shared(lowbit_shared)) + 1023) & ~1023u) + at;
}

// ---------------------------------------------------------------------------------------------------------- mbarriers
// A phase of an mbarrier completes when `count` threads have arrived and all bytes that they expect have been copied.

LOWBIT_DEVICE void mbarrier_init(uint32_t bar, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(count) : "memory");
}

// What was initialised can be used by copies. A barrier() must follow.
LOWBIT_DEVICE void mbarrier_init_done() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

LOWBIT_DEVICE void mbarrier_arrive(uint32_t bar) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(bar) : "memory");
}

LOWBIT_DEVICE void mbarrier_arrive_expect(uint32_t bar, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes) : "memory");
}

// Until the phase of this parity is complete; before the first phase, that of parity 1 is.
LOWBIT_DEVICE void mbarrier_wait(uint32_t bar, int parity) {
  asm volatile(
      "{\n.reg .pred p;\nWAIT_%=:\nmbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n@p bra DONE_%=;\n"
      "bra WAIT_%=;\nDONE_%=:\n}" ::"r"(bar),
      "r"(parity)
      : "memory");
}

// -------------------------------------------------------------------------------------------------------------- boxes

// Begins to copy the box of a matrix whose first element is (row, column), zeros for what is outside.
LOWBIT_DEVICE void copy_box(uint32_t to, const CUtensorMap* matrix, int column, int row, uint32_t bar) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::
          "r"(to),
      "l"(matrix), "r"(column), "r"(row), "r"(bar)
      : "memory");
}

LOWBIT_DEVICE void prefetch_map(const CUtensorMap* matrix) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(matrix) : "memory");
}

// Four matrices of 8 rows of 16 bytes: lane 8i + r has the address of row r of matrix i. Thread 4g + t gets 4 bytes at
// 4t of row g of each.
LOWBIT_DEVICE void load_matrices(uint32_t (&words)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(address)
               : "memory");
}

LOWBIT_DEVICE uint32_t load_pair(uint32_t address) {
  uint16_t pair;
  asm volatile("ld.shared.u16 %0, [%1];" : "=h"(pair) : "r"(address) : "memory");
  return pair;
}

LOWBIT_DEVICE void store_word(uint32_t address, uint32_t word) {
  asm volatile("st.shared.u32 [%0], %1;" ::"r"(address), "r"(word) : "memory");
}

// What the threads of a warp have stored is there for each of them.
LOWBIT_DEVICE void warp_barrier() { __syncwarp(); }

// word | bits & mask, as one instruction also where word and mask are constants.
LOWBIT_DEVICE uint32_t insert_bits(uint32_t word, uint32_t bits, uint32_t mask) {
  uint32_t result;
  asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(result) : "r"(bits), "r"(mask), "r"(word));
  return result;
}

// --------------------------------------------------------------------------------------------------------- warpgroups

// One thread of the warp.
LOWBIT_DEVICE bool elected() {
  uint32_t yes;
  asm volatile("{\n.reg .pred p;\nelect.sync _|p, 0xffffffff;\nselp.u32 %0, 1, 0, p;\n}" : "=r"(yes));
  return yes != 0;
}

template <int REGISTERS>
LOWBIT_DEVICE void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

template <int REGISTERS>
LOWBIT_DEVICE void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

// The registers that the next products use are written.
LOWBIT_DEVICE void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
LOWBIT_DEVICE void products_end() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
LOWBIT_DEVICE void products_wait() { asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory"); }

// What a product is told of a matrix [rows, 64] of 16-bit numbers that lies in shared memory as a box with a swizzle of
// 128 bytes: where its columns begin, and that its groups of 8 rows are 1024 bytes apart.
LOWBIT_DEVICE uint64_t describe_matrix(uint32_t address) {
  return static_cast<uint64_t>((address & 0x3FFFF) >> 4) | uint64_t(1) << 16 | uint64_t(1024 / 16) << 32 |
         uint64_t(1) << 62;
}

#define LOWBIT_WGMMA_64(TYPE)                                                                                         \
  asm volatile(                                                                                                       \
      "{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\n"                                                                    \
      "wgmma.mma_async.sync.aligned.m64n64k16.f32." TYPE "." TYPE " {"                                                \
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, "                              \
      "%18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"                                          \
      "}, {%32, %33, %34, %35}, %36, p, 1, 1, 0;\n}"                                                                  \
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),               \
          "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]),                    \
          "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]),                  \
          "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]),                  \
          "+f"(d[29]), "+f"(d[30]), "+f"(d[31])                                                                       \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(ADDS))

#define LOWBIT_WGMMA_128(TYPE)                                                                                        \
  asm volatile(                                                                                                       \
      "{\n.reg .pred p;\nsetp.ne.b32 p, %69, 0;\n"                                                                    \
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." TYPE "." TYPE " {"                                               \
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, "                              \
      "%18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, "                              \
      "%34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, "                              \
      "%50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"                                          \
      "}, {%64, %65, %66, %67}, %68, p, 1, 1, 0;\n}"                                                                  \
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),               \
          "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]),                    \
          "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]),                  \
          "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]),                  \
          "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]),                  \
          "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), "+f"(d[40]), "+f"(d[41]), "+f"(d[42]),                  \
          "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), "+f"(d[48]), "+f"(d[49]),                  \
          "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]), "+f"(d[56]),                  \
          "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])                   \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(ADDS))


// sums [64, COLUMNS] = a [64, 16] @ b [16, COLUMNS] (+ sums where ADDS), float32 sums; b is described as its transpose.
// Of thread 32w + 4g + t, a are the operands of multiply_matrices for rows 16w .. 16w + 15; d[4j .. 4j+3] are columns
// 8j + 2t and the next of row 16w + g, then of row 16w + g + 8.
template <DType T, bool ADDS>
LOWBIT_DEVICE void multiply_begin(float (&d)[32], const uint32_t (&a)[4], uint64_t b) {
  if constexpr (T == DType::f16)
    LOWBIT_WGMMA_64("f16");
  else
    LOWBIT_WGMMA_64("bf16");
}

template <DType T, bool ADDS>
LOWBIT_DEVICE void multiply_begin(float (&d)[64], const uint32_t (&a)[4], uint64_t b) {
  if constexpr (T == DType::f16)
    LOWBIT_WGMMA_128("f16");
  else
    LOWBIT_WGMMA_128("bf16");
}

#undef LOWBIT_WGMMA_64
#undef LOWBIT_WGMMA_128

// ------------------------------------------------------------------------------------------------------------ the host

// The map of a matrix in global memory by which boxes of it are copied; an error code of CUDA, 0: none. The driver's
// function is looked up at run time: the library does not need libcuda to be loaded. The map is a kernel's parameter,
// by value, so that a captured graph holds it.
inline int make_map(CUtensorMap& map, CUtensorMapDataType type, int element_bytes, const void* matrix, int64_t rows,
                    int64_t columns, int box_rows, int box_columns, CUtensorMapSwizzle swizzle) {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const Encode encode = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result;
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
    return reinterpret_cast<Encode>(error == cudaSuccess && result == cudaDriverEntryPointSuccess ? found : nullptr);
  }();
  if (encode == nullptr) return static_cast<int>(cudaErrorNotSupported);
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t pitch[1] = {static_cast<cuuint64_t>(columns) * element_bytes};
  const cuuint32_t box[2] = {static_cast<cuuint32_t>(box_columns), static_cast<cuuint32_t>(box_rows)};
  const cuuint32_t steps[2] = {1, 1};
  const CUresult result =
      encode(&map, type, 2, const_cast<void*>(matrix), sizes, pitch, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle,
             CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? 0 : static_cast<int>(cudaErrorInvalidValue);
}

}  // namespace cuda
}  // namespace lowbit
