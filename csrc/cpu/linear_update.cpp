#include <cstdint>

#include "isa.h"
#include "kernels.h"

#define ADAGRAD_KERNELS_FILE "linear_update.inl"
#include "for_each_isa.h"

namespace adagrad_kernels {

template <class T>
void linear_update_pack_range(const Outer<T>& a, int64_t first, int64_t last, T* packed) {
  ADAGRAD_KERNELS_DISPATCH(linear_update_pack_range, a, first, last, packed)
}
template <class T>
AdagradReductions linear_update_range(const LinearUpdate<T>& a, const T* grad_out, const T* input,
                                      int64_t first, int64_t last, T* scratch) {
  ADAGRAD_KERNELS_DISPATCH(linear_update_range, a, grad_out, input, first, last, scratch)
}
#define INSTANTIATE(T)                                                                       \
  template void linear_update_pack_range(const Outer<T>&, int64_t, int64_t, T*);             \
  template AdagradReductions linear_update_range(const LinearUpdate<T>&, const T*, const T*, \
                                                 int64_t, int64_t, T*);
INSTANTIATE(float)
INSTANTIATE(double)

}  // namespace adagrad_kernels
