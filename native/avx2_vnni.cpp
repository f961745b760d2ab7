#define ISA avx2_vnni
#define TABLE avx2_vnni_kernels
#include "isa.h"
