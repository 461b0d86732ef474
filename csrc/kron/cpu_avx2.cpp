#define LOWBIT_KERNEL kernel_avx2
#include "cpu_kernel.inc"
