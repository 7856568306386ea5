#if defined(__x86_64__)
#pragma GCC target("avx2,fma")
#include <immintrin.h>
#include "core.h"
#define ISA avx2
#define ISA_NAME "avx2"
#define W 8
#define MR 6
#include "core.inc"
#endif
