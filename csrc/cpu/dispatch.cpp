// Chooses, once, the kernels for the processor at hand.
#include <cstdlib>
#include <cstring>

#include "cpu/kernels.h"

namespace baseline {
extern const rope_fused::Kernels table;
}
#ifdef ROPE_FUSED_HAVE_X86_64_V3
namespace x86_64_v3 {
extern const rope_fused::Kernels table;
}
#endif
#ifdef ROPE_FUSED_HAVE_X86_64_V4
namespace x86_64_v4 {
extern const rope_fused::Kernels table;
}
#endif

namespace rope_fused {
namespace {

const Kernels& choose() {
  // ROPE_FUSED_CPU_ISA=baseline (or x86_64_v3) keeps to an older instruction set, for tests and
  // comparisons.
  const char* limit = std::getenv("ROPE_FUSED_CPU_ISA");
  const auto allowed = [limit](const char* name) {
    return limit == nullptr || std::strcmp(limit, name) == 0;
  };
  (void)allowed;
#ifdef ROPE_FUSED_HAVE_X86_64_V4
  if (allowed("x86_64_v4") && __builtin_cpu_supports("avx512f") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512cd") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    return x86_64_v4::table;
  }
#endif
#ifdef ROPE_FUSED_HAVE_X86_64_V3
  if (allowed("x86_64_v3") && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2") &&
      __builtin_cpu_supports("f16c")) {
    return x86_64_v3::table;
  }
#endif
  return baseline::table;
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace rope_fused
