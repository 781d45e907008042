// Every kernel for avx512_vnni. setup.py compiles this file with that instruction set's flags.
#define MISS_ISA avx512_vnni

#include "vec_avx512.h"

#include "kernels.h"
