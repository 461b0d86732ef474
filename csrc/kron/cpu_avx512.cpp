// Compiled three times: with F/BW/DQ/VL, with VNNI and VBMI added, and with BF16 added to those.
#if defined(__AVX512BF16__)
#define LOWBIT_KERNEL kernel_avx512bf16
#elif defined(__AVX512VNNI__)
#define LOWBIT_KERNEL kernel_avx512vnni
#else
#define LOWBIT_KERNEL kernel_avx512
#endif
#include "cpu_kernel.inc"
