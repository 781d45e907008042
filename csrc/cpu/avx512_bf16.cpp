// Every kernel for avx512_bf16. setup.py compiles this file with that instruction set's flags.
#define MISS_ISA avx512_bf16

#include "vec_avx512.h"

#include "kernels.h"
