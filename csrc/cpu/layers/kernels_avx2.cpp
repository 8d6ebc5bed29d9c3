// The layers' CPU kernels for AVX2 with FMA.
#if defined(__x86_64__)
#define T2T_FAST_ISA avx2
#define T2T_FAST_TARGET "avx2,fma"
#define T2T_FAST_LANES 8
#define T2T_FAST_PANEL 2
#include "kernels.inl"
#endif
