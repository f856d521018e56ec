#include "isa.h"

#include <cstdlib>
#include <cstring>
#include <initializer_list>

namespace adagrad_kernels {

const char* isa_name(Isa isa) {
  return isa == Isa::avx512 ? "avx512" : isa == Isa::avx2 ? "avx2" : "baseline";
}

static Isa detect() {
#if ADAGRAD_KERNELS_X86
  Isa best = Isa::baseline;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("bmi2")) {
    best = Isa::avx2;
  }
  if (best == Isa::avx2 && __builtin_cpu_supports("avx512f") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512cd")) {
    best = Isa::avx512;
  }
  if (const char* wanted = std::getenv("ADAGRAD_KERNELS_ISA")) {
    for (Isa lower : {Isa::baseline, Isa::avx2}) {
      if (lower < best && std::strcmp(wanted, isa_name(lower)) == 0) return lower;
    }
  }
  return best;
#else
  return Isa::baseline;
#endif
}

Isa isa() {
  static const Isa chosen = detect();
  return chosen;
}

}  // namespace adagrad_kernels
