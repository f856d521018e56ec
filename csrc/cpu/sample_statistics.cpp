#include <cstdint>

#include "isa.h"
#include "kernels.h"

#define ADAGRAD_KERNELS_FILE "sample_statistics.inl"
#include "for_each_isa.h"

namespace adagrad_kernels {

template <class T>
void sample_statistics_range(const T* g, int64_t rows, int64_t stride, int64_t first, int64_t last,
                             T* sum, T* sum_sq, double* norms_sq) {
  ADAGRAD_KERNELS_DISPATCH(sample_statistics_range, g, rows, stride, first, last, sum, sum_sq,
                           norms_sq)
}
template void sample_statistics_range(const float*, int64_t, int64_t, int64_t, int64_t, float*,
                                      float*, double*);
template void sample_statistics_range(const double*, int64_t, int64_t, int64_t, int64_t, double*,
                                      double*, double*);

}  // namespace adagrad_kernels
