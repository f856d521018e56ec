// Includes ADAGRAD_KERNELS_FILE once per instruction set (see isa.h). No include guard.

#define ADAGRAD_KERNELS_INLINE inline __attribute__((always_inline))

#if ADAGRAD_KERNELS_X86

#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4,prefer-vector-width=512")
namespace adagrad_kernels::avx512 {
constexpr int kVectorBytes = 64;
#include ADAGRAD_KERNELS_FILE
}  // namespace adagrad_kernels::avx512
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("arch=x86-64-v3")
namespace adagrad_kernels::avx2 {
constexpr int kVectorBytes = 32;
#include ADAGRAD_KERNELS_FILE
}  // namespace adagrad_kernels::avx2
#pragma GCC pop_options

#endif

namespace adagrad_kernels::baseline {
constexpr int kVectorBytes = 16;
#include ADAGRAD_KERNELS_FILE
}  // namespace adagrad_kernels::baseline
