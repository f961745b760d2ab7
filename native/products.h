// dot_product() and panel_product() of this instruction set.
#pragma once
#if defined(__AVX512BF16__)
#include "few_rows_avx512.h"
#include "panels_avx512.h"
#else
#include "panels_generic.h"
#endif
