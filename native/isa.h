// One instruction set's copy of every kernel. Each including unit defines ISA and TABLE and has its own -m flags. All code
// of the headers lies in namespace ISA and, without a name, is the unit's own.
#include "attention.h"
#include "convert.h"
#include "experts.h"
#include "heads.h"
#include "linear.h"
#include "small.h"

const Kernels TABLE = {ISA::linear,         ISA::experts,       ISA::attention,   ISA::norm,
                       ISA::rotary,         ISA::route,         ISA::quantize,    ISA::absorb,
                       ISA::per_head,       ISA::latent_entries, ISA::store_entries, ISA::linear_fp32,
                       ISA::embedding,        ISA::angles,         ISA::argmax,        ISA::step_inputs,    ISA::add,
                       ISA::concat,           ISA::weight_amax,   ISA::convert,     ISA::read};
