#include <cstdint>

#include "isa.h"
#include "kernels.h"

#define ADAGRAD_KERNELS_FILE "embedding.inl"
#include "for_each_isa.h"

namespace adagrad_kernels {

template <class T>
void embedding_range(const EmbeddingGrad<T>& a, int64_t first, int64_t last, double* norms,
                     T* scratch) {
  ADAGRAD_KERNELS_DISPATCH(embedding_range, a, first, last, norms, scratch)
}
template void embedding_range(const EmbeddingGrad<float>&, int64_t, int64_t, double*, float*);
template void embedding_range(const EmbeddingGrad<double>&, int64_t, int64_t, double*, double*);

}  // namespace adagrad_kernels
