#define ISA portable
#define TABLE portable_kernels
#include "isa.h"
