// The backward pass of a normalisation with the statistics of its scale and shift.
//
//   h = scale * g    x̂ = (x - mean) * rstd    dx = rstd * (h - average(h) - x̂ * average(h * x̂))
//
// with averages over what mean and rstd were taken of: a position (LayerNorm, RMSNorm), a group of
// channels of a sample (GroupNorm, InstanceNorm), a channel of the batch (BatchNorm).
//
// Cost: g and x are read and dx is written, 12 bytes an element in float32. Between, g and x are
// read once more, for the averages come first; but what an average is taken of then lies in cache:
// a row, a group, or a block of channels in all samples. A separate pass for the statistics would
// read g and x again, 8 bytes.

#include "norm_layouts.inl"

// R rows of one sample, each normalised by itself; sums to scale and shift [C], or adds.
template <class T, int R>
ADAGRAD_KERNELS_INLINE void rows_backward(const NormBackward<T>& a, int64_t row, bool add,
                                          T* __restrict__ scale, T* __restrict__ shift) {
  constexpr int kL = kLanes<T>;
  const int64_t n = a.channels;
  const T *g[R], *x[R];
  T mean[R], rstd[R], h_sum[R] = {}, hx_sum[R] = {};
  Vector<T> h_part[R] = {}, hx_part[R] = {};
  for (int r = 0; r < R; ++r) {
    g[r] = a.grad_out + (row + r) * n;
    x[r] = a.input + (row + r) * n;
    mean[r] = a.mean ? a.mean[row + r] : T(0);
    rstd[r] = a.rstd[row + r];
  }
  int64_t c = 0;
  for (; c + kL <= n; c += kL) {
    const Vector<T> w = load(a.scale + c);
    Vector<T> of_scale = {}, of_shift = {};
    if (add) of_scale = load(scale + c), of_shift = load(shift + c);
    for (int r = 0; r < R; ++r) {
      const Vector<T> v = load(g[r] + c), hat = (load(x[r] + c) - mean[r]) * rstd[r], h = v * w;
      of_scale += v * hat;
      of_shift += v;
      h_part[r] += h;
      hx_part[r] += h * hat;
    }
    store(scale + c, of_scale);
    store(shift + c, of_shift);
  }
  for (; c < n; ++c) {
    if (!add) scale[c] = shift[c] = 0;
    for (int r = 0; r < R; ++r) {
      const T hat = (x[r][c] - mean[r]) * rstd[r], h = g[r][c] * a.scale[c];
      scale[c] += g[r][c] * hat;
      shift[c] += g[r][c];
      h_sum[r] += h;
      hx_sum[r] += h * hat;
    }
  }
  for (int r = 0; r < R; ++r) {
    h_sum[r] += sum_of_lanes<T>(h_part[r]);
    hx_sum[r] += sum_of_lanes<T>(hx_part[r]);
    const T b = -rstd[r] * rstd[r] * hx_sum[r] / static_cast<T>(n);
    const T d = a.mean ? -rstd[r] * h_sum[r] / static_cast<T>(n) : T(0);
    T* __restrict__ dx = a.grad_input + (row + r) * n;
    const T* __restrict__ gr = g[r], * __restrict__ xr = x[r], * __restrict__ w = a.scale;
    const T m = mean[r], f = rstd[r];
    for (int64_t j = 0; j < n; ++j) dx[j] = f * w[j] * gr[j] + (b * (xr[j] - m) + d);
  }
}

// Groups [first, last) of one sample (or position); adds to scale and shift [C]. scratch [6 C].
template <class T>
ADAGRAD_KERNELS_INLINE void groups_backward(const NormBackward<T>& a, int64_t slab, int64_t first,
                                            int64_t last, T* scale, T* shift, T* scratch) {
  const int64_t each = a.channels / a.groups, n = (last - first) * each, c0 = first * each;
  const int64_t offset = slab * a.channels * a.inner + (a.channels_last ? c0 : c0 * a.inner);
  const T *g = a.grad_out + offset, *x = a.input + offset, *w = a.scale + c0;
  const T count = static_cast<T>(each * a.inner);
  T *mean = scratch, *of_scale = mean + n, *of_shift = of_scale + n;
  T *ca = of_shift + n, *cb = ca + n, *cd = cb + n;
  for (int64_t k = 0; k < last - first; ++k) {
    const T m = a.mean ? a.mean[slab * a.groups + first + k] : T(0);
    for (int64_t c = k * each; c < (k + 1) * each; ++c) mean[c] = m;
  }
  if (a.channels_last) {
    channels_last_sums(g, x, mean, n, a.inner, a.channels, of_scale, of_shift);
  } else {
    channels_first_sums(g, x, mean, n, a.inner, of_scale, of_shift);
  }
  for (int64_t k = 0; k < last - first; ++k) {
    const T rstd = a.rstd[slab * a.groups + first + k];
    T h = 0, hx = 0;
    for (int64_t c = k * each; c < (k + 1) * each; ++c) {
      scale[c0 + c] += of_scale[c] * rstd;
      shift[c0 + c] += of_shift[c];
      h += w[c] * of_shift[c];
      hx += w[c] * (of_scale[c] * rstd);
      ca[c] = rstd * w[c];
    }
    const T b = -rstd * rstd * hx / count, d = a.mean ? -rstd * h / count : T(0);
    for (int64_t c = k * each; c < (k + 1) * each; ++c) cb[c] = b, cd[c] = d;
  }
  T* dx = a.grad_input + offset;
  if (a.channels_last) {
    affine_rows(g, x, dx, n, a.inner, a.channels, ca, mean, cb, cd);
  } else {
    affine_channels(g, x, dx, n, a.inner, ca, mean, cb, cd);
  }
}

// So many groups at a time as fit the first cache with grad_out and input; all with channels last.
template <class T>
ADAGRAD_KERNELS_INLINE int64_t groups_at_a_time(const NormBackward<T>& a) {
  const int64_t size = a.groups ? a.channels / a.groups * a.inner : 0;
  const int64_t fit = a.channels_last ? a.groups : 2048 / (size ? size : 1);
  return fit < 1 ? 1 : fit;
}

template <class T>
ADAGRAD_KERNELS_INLINE void norm_samples(const NormBackward<T>& a, int64_t first, int64_t last,
                                         const ScaleSums<T>& out, double* norms, T* scratch) {
  T *scale = scratch, *shift = scratch + a.channels, *rest = scratch + 2 * a.channels;
  const bool rows = a.groups == 1 && a.inner == 1;
  const int64_t step = groups_at_a_time(a);
  for (int64_t i = first; i < last; ++i) {
    const int64_t start = i * a.positions, end = start + a.positions;
    int64_t t = start;
    if (!rows || t == end) {
      for (int64_t c = 0; c < 2 * a.channels; ++c) scratch[c] = 0;
    }
    if (rows) {
      for (; t + 4 <= end; t += 4) rows_backward<T, 4>(a, t, t > start, scale, shift);
      for (; t < end; ++t) rows_backward<T, 1>(a, t, t > start, scale, shift);
    }
    for (; t < end; ++t) {
      for (int64_t k = 0; k < a.groups; k += step) {
        const int64_t last_group = k + step < a.groups ? k + step : a.groups;
        groups_backward(a, t, k, last_group, scale, shift, rest);
      }
    }
    if (a.sample_grads) {
      T* own = a.sample_grads + 2 * i * a.channels;
      __builtin_memcpy(own, scratch, 2 * a.channels * sizeof(T));
    }
    add_sample(scale, a.channels, out.weight, out.weight_sq, norms + i);
    add_sample(shift, a.channels, out.bias, out.bias_sq, norms + i);
  }
}

// Channels [first, last) of all samples, at most kBatchBlock; samples [b, 2, C] is overwritten
// there.
template <class T>
ADAGRAD_KERNELS_INLINE void batch_channels(const NormBackward<T>& a, int64_t first, int64_t last,
                                           T* samples) {
  const int64_t n = last - first, sample = a.channels * a.inner;
  const int64_t offset = a.channels_last ? first : first * a.inner;
  const double count = static_cast<double>(a.samples * a.inner);
  const T* mean = a.mean + first;
  for (int64_t i = 0; i < a.samples; ++i) {
    const T *g = a.grad_out + i * sample + offset, *x = a.input + i * sample + offset;
    T *scale = samples + 2 * i * a.channels + first, *shift = scale + a.channels;
    if (a.channels_last) {
      channels_last_sums(g, x, mean, n, a.inner, a.channels, scale, shift);
    } else {
      channels_first_sums(g, x, mean, n, a.inner, scale, shift);
    }
    for (int64_t c = 0; c < n; ++c) scale[c] *= a.rstd[first + c];
  }
  double of_scale[kBatchBlock] = {}, of_shift[kBatchBlock] = {};
  for (int64_t i = 0; i < a.samples; ++i) {
    const T *scale = samples + 2 * i * a.channels + first, *shift = scale + a.channels;
    for (int64_t c = 0; c < n; ++c) of_scale[c] += scale[c];
    for (int64_t c = 0; c < n; ++c) of_shift[c] += shift[c];
  }
  T ca[kBatchBlock], cb[kBatchBlock], cd[kBatchBlock];
  for (int64_t c = 0; c < n; ++c) {
    const T rstd = a.rstd[first + c];
    ca[c] = rstd * a.scale[first + c];
    cb[c] = static_cast<T>(-rstd * ca[c] * of_scale[c] / count);
    cd[c] = static_cast<T>(-ca[c] * of_shift[c] / count);
  }
  for (int64_t i = 0; i < a.samples; ++i) {
    const T *g = a.grad_out + i * sample + offset, *x = a.input + i * sample + offset;
    T* dx = a.grad_input + i * sample + offset;
    if (a.channels_last) {
      affine_rows(g, x, dx, n, a.inner, a.channels, ca, mean, cb, cd);
    } else {
      affine_channels(g, x, dx, n, a.inner, ca, mean, cb, cd);
    }
  }
}

template <class T>
ADAGRAD_KERNELS_INLINE void add_samples(const T* samples, int64_t channels, int64_t first,
                                        int64_t last, const ScaleSums<T>& out, double* norms) {
  for (int64_t i = first; i < last; ++i) {
    const T* scale = samples + 2 * i * channels;
    add_sample(scale, channels, out.weight, out.weight_sq, norms + i);
    add_sample(scale + channels, channels, out.bias, out.bias_sq, norms + i);
  }
}

void bfloat16_to_float(const uint16_t* __restrict__ bits, int64_t n, float* __restrict__ out) {
  for (int64_t j = 0; j < n; ++j) {
    const uint32_t wide = static_cast<uint32_t>(bits[j]) << 16;
    __builtin_memcpy(out + j, &wide, sizeof(wide));
  }
}
void float_to_bfloat16(const float* __restrict__ values, int64_t n, uint16_t* __restrict__ out) {
  for (int64_t j = 0; j < n; ++j) {
    uint32_t bits;
    __builtin_memcpy(&bits, values + j, sizeof(bits));
    const uint32_t nearest = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    out[j] = static_cast<uint16_t>(values[j] == values[j] ? nearest : 0x7fc0);
  }
}

#define ADAGRAD_KERNELS_INSTANTIATE(T)                                                          \
  void norm_samples_range(const NormBackward<T>& a, int64_t first, int64_t last,                \
                          const ScaleSums<T>& out, double* norms, T* scratch) {                 \
    norm_samples<T>(a, first, last, out, norms, scratch);                                       \
  }                                                                                             \
  void norm_channels_range(const NormBackward<T>& a, int64_t first, int64_t last, T* samples) { \
    batch_channels<T>(a, first, last, samples);                                                 \
  }                                                                                             \
  void add_samples_range(const T* samples, int64_t channels, int64_t first, int64_t last,       \
                         const ScaleSums<T>& out, double* norms) {                              \
    add_samples<T>(samples, channels, first, last, out, norms);                                 \
  }
ADAGRAD_KERNELS_INSTANTIATE(float)
ADAGRAD_KERNELS_INSTANTIATE(double)
#undef ADAGRAD_KERNELS_INSTANTIATE
