#include <cstdint>

#include "isa.h"
#include "kernels.h"

#define ADAGRAD_KERNELS_FILE "adagrad.inl"
#include "for_each_isa.h"

namespace adagrad_kernels {

template <class T>
AdagradReductions adagrad_range(T* param, const T* grad, T* sum, const T* coordinate_sums,
                                int64_t n, const AdagradOptions& o) {
  ADAGRAD_KERNELS_DISPATCH(adagrad_range, param, grad, sum, coordinate_sums, n, o)
}
template <class T>
AdagradReductions adagrad_norm_reduce_range(const T* param, const T* grad, int64_t n,
                                            const AdagradOptions& o) {
  ADAGRAD_KERNELS_DISPATCH(adagrad_norm_reduce_range, param, grad, n, o)
}
template <class T>
AdagradReductions adagrad_norm_update_range(T* param, const T* grad, const T* coordinate_sums,
                                            int64_t n, double denominator,
                                            const AdagradOptions& o) {
  ADAGRAD_KERNELS_DISPATCH(adagrad_norm_update_range, param, grad, coordinate_sums, n, denominator,
                           o)
}
#define INSTANTIATE(T)                                                                          \
  template AdagradReductions adagrad_range(T*, const T*, T*, const T*, int64_t,                 \
                                           const AdagradOptions&);                              \
  template AdagradReductions adagrad_norm_reduce_range(const T*, const T*, int64_t,             \
                                                       const AdagradOptions&);                  \
  template AdagradReductions adagrad_norm_update_range(T*, const T*, const T*, int64_t, double, \
                                                       const AdagradOptions&);
INSTANTIATE(float)
INSTANTIATE(double)

}  // namespace adagrad_kernels
