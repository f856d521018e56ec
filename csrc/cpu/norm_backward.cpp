#include <cstdint>

#include "isa.h"
#include "kernels.h"

#define ADAGRAD_KERNELS_FILE "norm_backward.inl"
#include "for_each_isa.h"

namespace adagrad_kernels {

template <class T>
void norm_samples_range(const NormBackward<T>& a, int64_t first, int64_t last,
                        const ScaleSums<T>& out, double* norms, T* scratch) {
  ADAGRAD_KERNELS_DISPATCH(norm_samples_range, a, first, last, out, norms, scratch)
}
template <class T>
void norm_channels_range(const NormBackward<T>& a, int64_t first, int64_t last, T* samples) {
  ADAGRAD_KERNELS_DISPATCH(norm_channels_range, a, first, last, samples)
}
template <class T>
void add_samples_range(const T* samples, int64_t channels, int64_t first, int64_t last,
                       const ScaleSums<T>& out, double* norms) {
  ADAGRAD_KERNELS_DISPATCH(add_samples_range, samples, channels, first, last, out, norms)
}
void bfloat16_to_float(const uint16_t* bits, int64_t n, float* out) {
  ADAGRAD_KERNELS_DISPATCH(bfloat16_to_float, bits, n, out)
}
void float_to_bfloat16(const float* values, int64_t n, uint16_t* out) {
  ADAGRAD_KERNELS_DISPATCH(float_to_bfloat16, values, n, out)
}
#define ADAGRAD_KERNELS_INSTANTIATE(T)                                                            \
  template void norm_samples_range(const NormBackward<T>&, int64_t, int64_t, const ScaleSums<T>&, \
                                   double*, T*);                                                  \
  template void norm_channels_range(const NormBackward<T>&, int64_t, int64_t, T*);                \
  template void add_samples_range(const T*, int64_t, int64_t, int64_t, const ScaleSums<T>&,       \
                                  double*);
ADAGRAD_KERNELS_INSTANTIATE(float)
ADAGRAD_KERNELS_INSTANTIATE(double)
#undef ADAGRAD_KERNELS_INSTANTIATE

}  // namespace adagrad_kernels
