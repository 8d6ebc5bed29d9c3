// The layers' CPU kernels for AMX: products of bfloat16 in tiles, summed in float32.
#if defined(T2T_FAST_EMULATE_TILES)  // for tests, by any CPU
#define T2T_FAST_ISA amx
#define T2T_FAST_LANES 16
#define T2T_FAST_PANEL 2
#define T2T_FAST_PAIRS
#define T2T_FAST_TILES
#include "kernels.inl"
#elif defined(__x86_64__)
#include <immintrin.h>
#define T2T_FAST_ISA amx
#define T2T_FAST_TARGET "avx512f,avx512bw,avx512vl,avx512bf16,avx2,fma"
#define T2T_FAST_LANES 16
#define T2T_FAST_PANEL 2
#define T2T_FAST_PAIRS
#define T2T_FAST_BF16_UNIT
#define T2T_FAST_TILES
#include "kernels.inl"
#endif
