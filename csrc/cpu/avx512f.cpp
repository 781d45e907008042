// Every kernel for avx512f. setup.py compiles this file with that instruction set's flags.
#define MISS_ISA avx512f

#include "vec_avx512.h"

#include "kernels.h"
