#include <cstdint>

#include "isa.h"
#include "kernels.h"

#define ADAGRAD_KERNELS_FILE "scale.inl"
#include "for_each_isa.h"

namespace adagrad_kernels {

template <class T>
void scale_range(const ScaleGrad<T>& a, int64_t first, int64_t last, const ScaleSums<T>& out,
                 double* norms, T* scratch) {
  ADAGRAD_KERNELS_DISPATCH(scale_range, a, first, last, out, norms, scratch)
}
template void scale_range(const ScaleGrad<float>&, int64_t, int64_t, const ScaleSums<float>&,
                          double*, float*);
template void scale_range(const ScaleGrad<double>&, int64_t, int64_t, const ScaleSums<double>&,
                          double*, double*);

}  // namespace adagrad_kernels
