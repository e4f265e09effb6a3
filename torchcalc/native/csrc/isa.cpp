#include "isa.h"

#include <cstdlib>
#include <cstring>

namespace torchcalc {

static Isa detect() {
#if TC_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const char* wish = std::getenv("TORCHCALC_NATIVE_ISA");
  const bool baseline_wished = wish && std::strcmp(wish, "baseline") == 0;
  const bool avx2_wished = wish && std::strcmp(wish, "avx2") == 0;
  if (baseline_wished || !avx2) return Isa::baseline;
  return avx512 && !avx2_wished ? Isa::avx512 : Isa::avx2;
#else
  return Isa::baseline;
#endif
}

Isa isa() {
  static const Isa chosen = detect();
  return chosen;
}

const char* isa_name() {
  switch (isa()) {
    case Isa::avx512:
      return "avx512";
    case Isa::avx2:
      return "avx2";
    case Isa::baseline:
      break;
  }
#if defined(__aarch64__)
  return "neon";
#else
  return "baseline";
#endif
}

}  // namespace torchcalc
