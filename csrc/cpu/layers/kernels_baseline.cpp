// The layers' CPU kernels for every CPU: registers of four floats (SSE2, NEON).
#define T2T_FAST_ISA baseline
#define T2T_FAST_LANES 4
#if defined(__aarch64__)
#define T2T_FAST_PANEL 4  // 32 registers
#else
#define T2T_FAST_PANEL 2
#endif
#include "kernels.inl"
