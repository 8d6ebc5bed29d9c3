// The CPU kernels for every CPU: registers of four floats (SSE2, NEON).
#include "isa_headers.h"

#define T2T_FAST_ISA baseline
#define T2T_FAST_ISA_NAME "baseline"
#define T2T_FAST_LANES 4
#if defined(__aarch64__)
#define T2T_FAST_PANEL 4  // 32 registers
#else
#define T2T_FAST_PANEL 2
#endif
#include "isa.h"
