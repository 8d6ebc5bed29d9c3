// Compiles every CPU kernel of the layers for one instruction set, into a namespace of its own. The including file
// defines T2T_FAST_ISA (the namespace), T2T_FAST_LANES (floats in a register) and T2T_FAST_PANEL (registers in a
// product's panel), includes isa_headers.h and only then switches the compiler to the instruction set: code of a
// standard header must not be compiled for it, because the linker may keep that copy for everybody.

namespace t2t_fast::cpu::T2T_FAST_ISA {

#include "vector.h"
#include "gemm.h"
#include "tile.h"
#include "patches.h"
#include "soft_split_linear.h"
#include "performer.h"
#include "dropout.h"
#include "tail.h"
#include "layers.h"

}  // namespace t2t_fast::cpu::T2T_FAST_ISA
