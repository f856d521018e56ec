// The parts of the linear layer's statistics that are not matrix products.

#include "vector.inl"

template <class T>
ADAGRAD_KERNELS_INLINE double squared_length(const T* x, int64_t n) {
  Vector<T> part[4] = {};
  int64_t j = 0;
  for (; j + 4 * kLanes<T> <= n; j += 4 * kLanes<T>) {
    for (int i = 0; i < 4; ++i) {
      const Vector<T> v = load(x + j + i * kLanes<T>);
      part[i] += v * v;
    }
  }
  double total = sum_of_lanes<T>((part[0] + part[1]) + (part[2] + part[3]));
  for (; j < n; ++j) total += static_cast<double>(x[j]) * x[j];
  return total;
}

template <class T>
ADAGRAD_KERNELS_INLINE void outer_norms(const T* grad_out, int64_t out_features, const T* input,
                                        int64_t in_features, bool bias, int64_t first, int64_t last,
                                        T* norms) {
  for (int64_t i = first; i < last; ++i) {
    const double length =
        (input ? squared_length(input + i * in_features, in_features) : 0) + (bias ? 1 : 0);
    norms[i] = static_cast<T>(length * squared_length(grad_out + i * out_features, out_features));
  }
}

template <class T>
ADAGRAD_KERNELS_INLINE void bias_sums(const T* grad_out, int64_t positions, int64_t out_features,
                                      int64_t first, int64_t last, T* sum, T* sum_sq, double* norms,
                                      T* scratch) {
  for (int64_t i = first; i < last; ++i) {
    const T* rows = grad_out + i * positions * out_features;
    const T* sample = rows;
    if (positions != 1) {
      for (int64_t j = 0; j < out_features; ++j) scratch[j] = 0;
      for (int64_t t = 0; t < positions; ++t) {
        for (int64_t j = 0; j < out_features; ++j) scratch[j] += rows[t * out_features + j];
      }
      sample = scratch;
    }
    for (int64_t j = 0; j < out_features; ++j) sum[j] += sample[j];
    if (sum_sq) {
      for (int64_t j = 0; j < out_features; ++j) sum_sq[j] += sample[j] * sample[j];
    }
    if (norms) norms[i] += squared_length(sample, out_features);
  }
}

#define ADAGRAD_KERNELS_INSTANTIATE(T)                                                            \
  void outer_norms_range(const T* grad_out, int64_t out_features, const T* input,                 \
                         int64_t in_features, bool bias, int64_t first, int64_t last, T* norms) { \
    outer_norms<T>(grad_out, out_features, input, in_features, bias, first, last, norms);         \
  }                                                                                               \
  void bias_range(const T* grad_out, int64_t positions, int64_t out_features, int64_t first,      \
                  int64_t last, T* sum, T* sum_sq, double* norms, T* scratch) {                   \
    bias_sums<T>(grad_out, positions, out_features, first, last, sum, sum_sq, norms, scratch);    \
  }
ADAGRAD_KERNELS_INSTANTIATE(float)
ADAGRAD_KERNELS_INSTANTIATE(double)
#undef ADAGRAD_KERNELS_INSTANTIATE
