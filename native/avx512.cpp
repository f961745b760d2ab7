#define ISA avx512
#define TABLE avx512_kernels
#include "isa.h"
