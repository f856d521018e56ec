// Instruction sets: every CPU kernel is compiled once per set and chosen at run time.
//
// A kernel lives in an .inl file that is included by for_each_isa.h into one namespace per
// set, under `#pragma GCC target`. Such a file uses raw pointers and builtin types only:
// a std:: template instantiated there could be merged by the linker with a copy that an
// older processor must run.
#pragma once

namespace adagrad_kernels {

enum class Isa { baseline = 0, avx2 = 1, avx512 = 2 };

// The best set that was compiled and that this processor has; ADAGRAD_KERNELS_ISA
// (baseline, avx2, avx512) can lower it. Read once.
Isa isa();
const char* isa_name(Isa isa);

}  // namespace adagrad_kernels

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define ADAGRAD_KERNELS_X86 1
#define ADAGRAD_KERNELS_DISPATCH(function, ...)                  \
  switch (::adagrad_kernels::isa()) {                            \
    case ::adagrad_kernels::Isa::avx512:                         \
      return ::adagrad_kernels::avx512::function(__VA_ARGS__);   \
    case ::adagrad_kernels::Isa::avx2:                           \
      return ::adagrad_kernels::avx2::function(__VA_ARGS__);     \
    default:                                                     \
      return ::adagrad_kernels::baseline::function(__VA_ARGS__); \
  }
#else
#define ADAGRAD_KERNELS_X86 0
#define ADAGRAD_KERNELS_DISPATCH(function, ...) \
  return ::adagrad_kernels::baseline::function(__VA_ARGS__);
#endif
