// One instruction set's copy of every kernel. Each including unit defines ISA and TABLE and has its own -m flags.
#include "kernels.h"
#include "pool.h"

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace ISA {
namespace {
#include "simd.h"
#include "operand.h"
#include "decode.h"
#if defined(__AVX512BF16__)
#include "decode_avx512.h"
#include "nvfp4_avx512.h"
#include "few_rows_avx512.h"
#include "panels_avx512.h"
#else
#if defined(__AVX2__)
#include "nvfp4_avx2.h"
#endif
#include "dot_generic.h"
#endif
#include "linear.h"
#include "experts.h"
#include "attention.h"
#include "small.h"
#include "heads.h"
}  // namespace
}  // namespace ISA

const Kernels TABLE = {ISA::linear,         ISA::experts,       ISA::attention,   ISA::norm,
                       ISA::rotary,         ISA::route,         ISA::quantize,    ISA::absorb,
                       ISA::per_head,       ISA::latent_entries, ISA::store_entries, ISA::linear_fp32,
                       ISA::embedding,        ISA::angles,         ISA::argmax,        ISA::add,
                       ISA::concat,           ISA::read};
