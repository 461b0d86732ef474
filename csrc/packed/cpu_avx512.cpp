// Compiled twice: with F/BW/DQ/VL, and with VNNI and VBMI added.
#if defined(__AVX512VNNI__)
#define LOWBIT_KERNEL kernel_avx512vnni
#else
#define LOWBIT_KERNEL kernel_avx512
#endif
#include "cpu_kernel.inc"
