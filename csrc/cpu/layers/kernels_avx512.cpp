// The layers' CPU kernels for AVX-512.
#if defined(__x86_64__)
#define T2T_FAST_ISA avx512
#define T2T_FAST_TARGET "avx512f,avx512bw,avx512vl,avx2,fma"
#define T2T_FAST_LANES 16
#define T2T_FAST_PANEL 4
#include "kernels.inl"
#endif
