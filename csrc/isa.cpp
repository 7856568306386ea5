// Chooses the core once: the best instruction set of this CPU and its operating system.
#include "core.h"

#include <cstdlib>
#include <cstring>

namespace fastvlm {
#define DECLARE(isa) \
  namespace isa { extern const Core core_table; }
DECLARE(base)
#if defined(__x86_64__)
DECLARE(avx2)
DECLARE(avx512)
DECLARE(avx512bf16)
#endif

static const Core& choose() {
  const Core* found[4] = {&base::core_table};
  int n = 1;
#if defined(__x86_64__)
  __builtin_cpu_init();  // its answers include what the operating system saves
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    found[n++] = &avx2::core_table;
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl")) {
      found[n++] = &avx512::core_table;
      if (__builtin_cpu_supports("avx512bf16")) found[n++] = &avx512bf16::core_table;
    }
  }
#endif
  if (const char* wanted = std::getenv("FASTVLM_LOSS_CPU_ISA"))
    for (int i = 0; i < n; ++i)
      if (!std::strcmp(wanted, found[i]->name)) return *found[i];
  return *found[n - 1];
}

const Core& core() {
  static const Core& chosen = choose();
  return chosen;
}

}  // namespace fastvlm
