#define ISA avx2
#define TABLE avx2_kernels
#include "isa.h"
