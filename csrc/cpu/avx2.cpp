// Every kernel for avx2. setup.py compiles this file with that instruction set's flags.
#define MISS_ISA avx2

#include "vec_avx2.h"

#include "kernels.h"
