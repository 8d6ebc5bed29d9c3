// The layers' CPU kernels for AVX512_BF16: products of bfloat16, summed in float32.
#if defined(__x86_64__)
#include <immintrin.h>
#define T2T_FAST_ISA avx512_bf16
#define T2T_FAST_TARGET "avx512f,avx512bw,avx512vl,avx512bf16,avx2,fma"
#define T2T_FAST_LANES 16
#define T2T_FAST_PANEL 4
#define T2T_FAST_PAIRS
#define T2T_FAST_BF16_UNIT
#include "kernels.inl"
#endif
