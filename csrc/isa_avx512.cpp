#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512")
#include <immintrin.h>
#include "core.h"
#define ISA avx512
#define ISA_NAME "avx512"
#define W 16
#define MR 12
#include "core.inc"
#endif
