#include <cstdint>

#include "isa.h"
#include "kernels.h"

#define ADAGRAD_KERNELS_FILE "outer.inl"
#include "for_each_isa.h"

namespace adagrad_kernels {

template <class T>
OuterTiles outer_tiles(const Outer<T>& a) {
  ADAGRAD_KERNELS_DISPATCH(outer_tiles, a)
}
template <class T>
void outer_pack_range(const Outer<T>& a, int64_t first, int64_t last, T* packed) {
  ADAGRAD_KERNELS_DISPATCH(outer_pack_range, a, first, last, packed)
}
template <class T>
void outer_panel_range(const Outer<T>& a, const T* packed, int64_t panel, int64_t first,
                       int64_t last, T* scratch) {
  ADAGRAD_KERNELS_DISPATCH(outer_panel_range, a, packed, panel, first, last, scratch)
}
#define INSTANTIATE(T)                                                   \
  template OuterTiles outer_tiles(const Outer<T>&);                      \
  template void outer_pack_range(const Outer<T>&, int64_t, int64_t, T*); \
  template void outer_panel_range(const Outer<T>&, const T*, int64_t, int64_t, int64_t, T*);
INSTANTIATE(float)
INSTANTIATE(double)

}  // namespace adagrad_kernels
