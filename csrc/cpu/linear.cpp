#include <cstdint>

#include "isa.h"
#include "kernels.h"

#define ADAGRAD_KERNELS_FILE "linear.inl"
#include "for_each_isa.h"

namespace adagrad_kernels {

template <class T>
void outer_norms_range(const T* grad_out, int64_t out_features, const T* input, int64_t in_features,
                       bool bias, int64_t first, int64_t last, T* norms) {
  ADAGRAD_KERNELS_DISPATCH(outer_norms_range, grad_out, out_features, input, in_features, bias,
                           first, last, norms)
}
template <class T>
void bias_range(const T* grad_out, int64_t positions, int64_t out_features, int64_t first,
                int64_t last, T* sum, T* sum_sq, double* norms, T* scratch) {
  ADAGRAD_KERNELS_DISPATCH(bias_range, grad_out, positions, out_features, first, last, sum, sum_sq,
                           norms, scratch)
}
#define INSTANTIATE(T)                                                                          \
  template void outer_norms_range(const T*, int64_t, const T*, int64_t, bool, int64_t, int64_t, \
                                  T*);                                                          \
  template void bias_range(const T*, int64_t, int64_t, int64_t, int64_t, T*, T*, double*, T*);
INSTANTIATE(float)
INSTANTIATE(double)

}  // namespace adagrad_kernels
