// Compiles every CPU kernel of the layers for one instruction set, into a namespace of its own. Included only by
// kernels_{amx,avx512_bf16,avx512,avx2,baseline}.cpp, each of which defines
//   T2T_FAST_ISA     the namespace, and the name of the instruction set
//   T2T_FAST_TARGET  what the compiler may use beyond its default; undefined for the default
//   T2T_FAST_LANES   floats in a register
//   T2T_FAST_PANEL   registers in a product's panel
// and, for products of bfloat16,
//   T2T_FAST_PAIRS      cells are pairs of bfloat16
//   T2T_FAST_BF16_UNIT  the CPU has AVX512_BF16
//   T2T_FAST_TILES      products run in the tiles of AMX
// The standard headers come first, before the compiler switches to the instruction set: the linker keeps one copy of an
// inline function for the whole library, and that copy must run on every CPU.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <vector>

#include "../../half.h"
#include "../memory.h"
#include "kernels.h"

#define T2T_FAST_TEXT_OF(x) #x
#define T2T_FAST_TEXT(x) T2T_FAST_TEXT_OF(x)
#define T2T_FAST_PRAGMA(x) _Pragma(T2T_FAST_TEXT_OF(x))

#if defined(T2T_FAST_TARGET) && defined(__clang__)
T2T_FAST_PRAGMA(clang attribute push(__attribute__((target(T2T_FAST_TARGET))), apply_to = function))
#elif defined(T2T_FAST_TARGET)
T2T_FAST_PRAGMA(GCC target(T2T_FAST_TARGET))
#endif

namespace t2t_fast::cpu::T2T_FAST_ISA {

// clang-format off: in the order in which they use each other
#include "vector.inl"
#include "cells.inl"
#include "packing.inl"
#if defined(T2T_FAST_TILES)
#include "tiles.inl"
#include "gemm_tiles.inl"
#else
#include "gemm.inl"
#endif
#include "tile.inl"
#include "operand.inl"
#include "packed_linear.inl"
#include "patches.inl"
#include "dropout.inl"
#include "soft_split_linear.inl"
#include "performer_attention.inl"
#include "token_mlp.inl"
#include "performer_layer.inl"
#include "block.inl"
#include "block_backward.inl"
// clang-format on

extern const Kernels table;
const Kernels table = {
    T2T_FAST_TEXT(T2T_FAST_ISA),
    soft_split_linear,
    soft_split_linear_backward,
    performer_attention,
    performer_attention_backward,
    token_mlp,
    token_mlp_backward,
    performer_layer,
    performer_layer_backward,
    packed_linear_size,
    pack_linear,
    transformer_block,
    transformer_block_backward,
};

}  // namespace t2t_fast::cpu::T2T_FAST_ISA

#if defined(T2T_FAST_TARGET) && defined(__clang__)
#pragma clang attribute pop
#endif
