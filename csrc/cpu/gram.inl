// The squared norm of one sample by products of its positions, see gram_sample.inl.

#include "gram_sample.inl"

#define ADAGRAD_KERNELS_INSTANTIATE(T)                                                  \
  double gram_norm(const T* u, int64_t nu, const T* v, int64_t nv, int64_t positions) { \
    return gram_sample<T>(u, nu, v, nv, positions);                                     \
  }
ADAGRAD_KERNELS_INSTANTIATE(float)
ADAGRAD_KERNELS_INSTANTIATE(double)
#undef ADAGRAD_KERNELS_INSTANTIATE
