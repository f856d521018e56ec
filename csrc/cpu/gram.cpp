#include <cstdint>

#include "isa.h"
#include "kernels.h"

#define ADAGRAD_KERNELS_FILE "gram.inl"
#include "for_each_isa.h"

namespace adagrad_kernels {

template <class T>
double gram_norm(const T* u, int64_t nu, const T* v, int64_t nv, int64_t positions) {
  ADAGRAD_KERNELS_DISPATCH(gram_norm, u, nu, v, nv, positions)
}
template double gram_norm(const float*, int64_t, const float*, int64_t, int64_t);
template double gram_norm(const double*, int64_t, const double*, int64_t, int64_t);

}  // namespace adagrad_kernels
