#define LOWBIT_KERNEL kernel_scalar
#include "cpu_kernel.inc"
