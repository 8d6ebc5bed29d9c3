// The CPU kernels for AVX-512.
#if defined(__x86_64__)

#include "isa_headers.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx2,fma")
#endif

#define T2T_FAST_ISA avx512
#define T2T_FAST_ISA_NAME "avx512"
#define T2T_FAST_LANES 16
#define T2T_FAST_PANEL 4
#include "isa.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif
