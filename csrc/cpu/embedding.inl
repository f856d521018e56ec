// Columns [first, last) of an embedding's gradient: the samples one after the other, in each
// the positions of one token together.
//
// Cost: grad_out is read once; a row of the weight gradient (and of the coordinate sums) is read
// and written once for each different token of a sample. Threads own columns, so no row is
// shared and the order of additions is that of the samples.

#include "vector.inl"

template <class T>
ADAGRAD_KERNELS_INLINE void embedding_columns(const EmbeddingGrad<T>& a, int64_t first,
                                              int64_t last, double* norms, T* scratch) {
  const int64_t n = last - first;
  for (int64_t i = 0; i < a.samples; ++i) {
    const int64_t* order = a.order + i * a.positions;
    const int64_t* tokens = a.tokens + i * a.positions;
    const T* sample = a.grad_out + i * a.positions * a.width + first;
    double norm = 0;
    for (int64_t k = 0; k < a.positions;) {
      const int64_t token = tokens[order[k]];
      const T* row = sample + order[k] * a.width;
      int64_t same = k + 1;
      while (same < a.positions && tokens[order[same]] == token) ++same;
      if (token == a.padding_idx) {
        k = same;
        continue;
      }
      if (same > k + 1) {
        for (int64_t j = 0; j < n; ++j) scratch[j] = row[j];
        for (int64_t q = k + 1; q < same; ++q) {
          const T* more = sample + order[q] * a.width;
          for (int64_t j = 0; j < n; ++j) scratch[j] += more[j];
        }
        row = scratch;
      }
      T* sum = a.sum + token * a.width + first;
      T part = 0;
      for (int64_t j = 0; j < n; ++j) {
        sum[j] += row[j];
        part += row[j] * row[j];
      }
      if (a.sum_sq) {
        T* sum_sq = a.sum_sq + token * a.width + first;
        for (int64_t j = 0; j < n; ++j) sum_sq[j] += row[j] * row[j];
      }
      norm += part;
      k = same;
    }
    norms[i] += norm;
  }
}

#define ADAGRAD_KERNELS_INSTANTIATE(T)                                                        \
  void embedding_range(const EmbeddingGrad<T>& a, int64_t first, int64_t last, double* norms, \
                       T* scratch) {                                                          \
    embedding_columns<T>(a, first, last, norms, scratch);                                     \
  }
ADAGRAD_KERNELS_INSTANTIATE(float)
ADAGRAD_KERNELS_INSTANTIATE(double)
#undef ADAGRAD_KERNELS_INSTANTIATE
