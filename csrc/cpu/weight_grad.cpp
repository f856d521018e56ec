#include <cstdint>

#include "isa.h"
#include "kernels.h"

#define ADAGRAD_KERNELS_FILE "weight_grad.inl"
#include "for_each_isa.h"

namespace adagrad_kernels {

template <class T>
void weight_grad_range(const WeightGrad<T>& a, int64_t first, int64_t last, int64_t first_panel,
                       int64_t last_panel) {
  ADAGRAD_KERNELS_DISPATCH(weight_grad_range, a, first, last, first_panel, last_panel)
}
template <class T>
void gram_norms_range(const WeightGrad<T>& a, int64_t first, int64_t last) {
  ADAGRAD_KERNELS_DISPATCH(gram_norms_range, a, first, last)
}
template <class T>
void pack_images_range(const WeightGrad<T>& a, int64_t first, int64_t last, T* images) {
  ADAGRAD_KERNELS_DISPATCH(pack_images_range, a, first, last, images)
}
template <class T>
void unpack_panel(const T* panel, int64_t members, int64_t panel_width, int64_t lanes,
                  bool lanes_outer, int64_t out_stride, T* out) {
  ADAGRAD_KERNELS_DISPATCH(unpack_panel, panel, members, panel_width, lanes, lanes_outer,
                           out_stride, out)
}
#define INSTANTIATE(T)                                                                       \
  template void pack_images_range(const WeightGrad<T>&, int64_t, int64_t, T*);               \
  template void gram_norms_range(const WeightGrad<T>&, int64_t, int64_t);                    \
  template void weight_grad_range(const WeightGrad<T>&, int64_t, int64_t, int64_t, int64_t); \
  template void unpack_panel(const T*, int64_t, int64_t, int64_t, bool, int64_t, T*);
INSTANTIATE(float)
INSTANTIATE(double)

}  // namespace adagrad_kernels
