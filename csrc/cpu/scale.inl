// Gradients of a scale and a shift by channel with their per-sample statistics.
//
// Cost: one read of grad_out and of input, three operations an element: bound by memory, and
// it replaces the two reads that a plain backward makes for the same sums.

#include "norm_sums.inl"

// One position of all channels, channels last (S = 1).
template <class T>
ADAGRAD_KERNELS_INLINE void add_position(const ScaleGrad<T>& a, const T* __restrict__ g,
                                         const T* __restrict__ x, const T* __restrict__ mean,
                                         const T* __restrict__ rstd, T* __restrict__ scale,
                                         T* __restrict__ shift) {
  const int64_t n = a.channels;
  if (n == 0) return;  // nor need there be a mean
  if (a.mean_channel == 0 && a.rstd_channel == 0) {
    const T m = *mean, r = *rstd;
    for (int64_t c = 0; c < n; ++c) {
      scale[c] += g[c] * ((x[c] - m) * r);
      shift[c] += g[c];
    }
  } else {
    for (int64_t c = 0; c < n; ++c) {
      scale[c] += g[c] * ((x[c] - mean[c * a.mean_channel]) * rstd[c * a.rstd_channel]);
      shift[c] += g[c];
    }
  }
}

template <class T>
ADAGRAD_KERNELS_INLINE void scale_samples(const ScaleGrad<T>& a, int64_t first, int64_t last,
                                          const ScaleSums<T>& out, double* norms, T* scratch) {
  T* scale = scratch;
  T* shift = scratch + a.channels;
  const int64_t position_size = a.channels * a.inner;
  for (int64_t i = first; i < last; ++i) {
    for (int64_t c = 0; c < 2 * a.channels; ++c) scratch[c] = 0;
    for (int64_t t = 0; t < a.positions; ++t) {
      const T* g = a.grad_out + (i * a.positions + t) * position_size;
      const T* x = a.input + (i * a.positions + t) * position_size;
      const T* mean = a.mean + i * a.mean_sample + t * a.mean_position;
      const T* rstd = a.rstd + i * a.rstd_sample + t * a.rstd_position;
      if (a.inner == 1) {
        add_position(a, g, x, mean, rstd, scale, shift);
        continue;
      }
      for (int64_t c = 0; c < a.channels; ++c) {
        const ChannelSums<T> sums =
            channel_sums(g + c * a.inner, out.weight ? x + c * a.inner : nullptr,
                         mean[c * a.mean_channel], a.inner);
        scale[c] += sums.scale * rstd[c * a.rstd_channel];
        shift[c] += sums.shift;
      }
    }
    add_sample(scale, a.channels, out.weight, out.weight_sq, norms + i);
    add_sample(shift, a.channels, out.bias, out.bias_sq, norms + i);
  }
}

#define ADAGRAD_KERNELS_INSTANTIATE(T)                                                          \
  void scale_range(const ScaleGrad<T>& a, int64_t first, int64_t last, const ScaleSums<T>& out, \
                   double* norms, T* scratch) {                                                 \
    scale_samples<T>(a, first, last, out, norms, scratch);                                      \
  }
ADAGRAD_KERNELS_INSTANTIATE(float)
ADAGRAD_KERNELS_INSTANTIATE(double)
#undef ADAGRAD_KERNELS_INSTANTIATE
