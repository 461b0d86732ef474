// The kernels of the family `codebook` on the vectors of cpu/simd.h; compiled once per instruction set.
#include "cpu/codebook/kernel.h"

// Two ways to multiply, of which one only exists with VNNI and VBMI: the preprocessor chooses.
#if defined(__AVX512VBMI__)
#include "cpu/codebook/linear_words.h"
#else
#include "cpu/codebook/linear_panels.h"
#endif

namespace lowbit {
namespace codebook {
namespace {

void dequantize(const Weight& w, int64_t n, DType dtype, void* out) {
  Linear a{};
  a.weight = w;
  dequantize_row<Expander>(a, n, dtype, out);
}

}  // namespace

const CpuKernel LOWBIT_FOR_ISA(kernel) = {prepared_bytes, prepare, linear, dequantize, kRowTile};

}  // namespace codebook
}  // namespace lowbit
