#if defined(__x86_64__)
#pragma GCC target("avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512")
#include <immintrin.h>
#include "core.h"
#define ISA avx512bf16
#define ISA_NAME "avx512+bf16"
#define FASTVLM_BF16 1
#define W 16
#define MR 12
#include "core.inc"
#endif
