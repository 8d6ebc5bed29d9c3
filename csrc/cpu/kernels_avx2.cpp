// The CPU kernels for AVX2 with FMA.
#if defined(__x86_64__)

#include "isa_headers.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif

#define T2T_FAST_ISA avx2
#define T2T_FAST_ISA_NAME "avx2"
#define T2T_FAST_LANES 8
#define T2T_FAST_PANEL 2
#include "isa.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif
