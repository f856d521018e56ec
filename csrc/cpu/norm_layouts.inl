// Included by norm_backward.inl: its two passes over channels that are contiguous, [C, S], or last,
// [S, C].

#include "norm_sums.inl"

#if !defined(__clang__)
// The sums of two vectors' lanes i and i + kStep: of the first where i has no bit kStep.
template <class T, int kStep>
ADAGRAD_KERNELS_INLINE Vector<T> merge(Vector<T> first, Vector<T> second) {
  decltype(first < second) low, high;
  for (int i = 0; i < kLanes<T>; ++i) {
    low[i] = i & kStep ? kLanes<T> + i - kStep : i;
    high[i] = i & kStep ? kLanes<T> + i : i + kStep;
  }
  return __builtin_shuffle(first, second, low) + __builtin_shuffle(first, second, high);
}

// channel_sums of as many channels as a vector has lanes, one in each lane: inner is a multiple of
// that number. Two shuffles a sum instead of a reduction each.
template <class T, int kStep = 1>
ADAGRAD_KERNELS_INLINE void lane_sums(const T* g, const T* x, const T* mean, int64_t inner,
                                      Vector<T>* scale, Vector<T>* shift) {
  constexpr int kL = kLanes<T>;
  if constexpr (kStep == kL) {
    Vector<T> a = {}, b = {};
    for (int64_t j = 0; j < inner; j += kL) {
      const Vector<T> v = load(g + j);
      a += v * (load(x + j) - *mean);
      b += v;
    }
    *scale = a;
    *shift = b;
  } else {
    Vector<T> a[2], b[2];
    lane_sums<T, 2 * kStep>(g, x, mean, inner, a, b);
    lane_sums<T, 2 * kStep>(g + kStep * inner, x + kStep * inner, mean + kStep, inner, a + 1,
                            b + 1);
    *scale = merge<T, kStep>(a[0], a[1]);
    *shift = merge<T, kStep>(b[0], b[1]);
  }
}
#endif

// n channels of `inner` contiguous elements; scale and shift are overwritten.
template <class T>
ADAGRAD_KERNELS_INLINE void channels_first_sums(const T* g, const T* x, const T* mean, int64_t n,
                                                int64_t inner, T* scale, T* shift) {
  constexpr int kL = kLanes<T>;
  int64_t c = 0;
#if !defined(__clang__)
  if (inner % kL == 0 && inner < 8 * kL) {
    for (; c + kL <= n; c += kL) {
      Vector<T> a, b;
      lane_sums(g + c * inner, x + c * inner, mean + c, inner, &a, &b);
      store(scale + c, a);
      store(shift + c, b);
    }
  }
#endif
  for (; c < n; ++c) {
    const ChannelSums<T> sums = channel_sums(g + c * inner, x + c * inner, mean[c], inner);
    scale[c] = sums.scale;
    shift[c] = sums.shift;
  }
}

// dx = a * g + b * (x - mean) + d by channel, n channels of `inner` contiguous elements.
template <class T>
ADAGRAD_KERNELS_INLINE void affine_channels(const T* g, const T* x, T* dx, int64_t n, int64_t inner,
                                            const T* a, const T* mean, const T* b, const T* d) {
  constexpr int kL = kLanes<T>;
  for (int64_t c = 0; c < n; ++c, g += inner, x += inner, dx += inner) {
    const T ac = a[c], mc = mean[c], bc = b[c], dc = d[c];
    int64_t j = 0;
    for (; j + kL <= inner; j += kL) {
      store(dx + j, ac * load(g + j) + (bc * (load(x + j) - mc) + dc));
    }
    for (; j < inner; ++j) dx[j] = ac * g[j] + (bc * (x[j] - mc) + dc);
  }
}

// V vectors of channels over rows that are `stride` apart: sums of g and g * (x - mean).
template <class T, int V>
ADAGRAD_KERNELS_INLINE void position_sums(const T* g, const T* x, const T* mean, int64_t rows,
                                          int64_t stride, T* scale, T* shift) {
  constexpr int kL = kLanes<T>;
  Vector<T> a[V] = {}, b[V] = {}, m[V];
  for (int k = 0; k < V; ++k) m[k] = load(mean + k * kL);
  for (int64_t s = 0; s < rows; ++s) {
    for (int k = 0; k < V; ++k) {
      const Vector<T> v = load(g + s * stride + k * kL);
      a[k] += v * (load(x + s * stride + k * kL) - m[k]);
      b[k] += v;
    }
  }
  for (int k = 0; k < V; ++k) {
    store(scale + k * kL, a[k]);
    store(shift + k * kL, b[k]);
  }
}

// n channels over rows, channels last; scale and shift are overwritten.
template <class T>
ADAGRAD_KERNELS_INLINE void channels_last_sums(const T* g, const T* x, const T* mean, int64_t n,
                                               int64_t rows, int64_t stride, T* scale, T* shift) {
  constexpr int kL = kLanes<T>;
  int64_t c = 0;
  for (; c + 4 * kL <= n; c += 4 * kL) {
    position_sums<T, 4>(g + c, x + c, mean + c, rows, stride, scale + c, shift + c);
  }
  for (; c + kL <= n; c += kL) {
    position_sums<T, 1>(g + c, x + c, mean + c, rows, stride, scale + c, shift + c);
  }
  for (; c < n; ++c) {
    T a = 0, b = 0;
    for (int64_t s = 0; s < rows; ++s) {
      a += g[s * stride + c] * (x[s * stride + c] - mean[c]);
      b += g[s * stride + c];
    }
    scale[c] = a;
    shift[c] = b;
  }
}

// dx = a * g + b * (x - mean) + d by channel, rows of n channels.
template <class T>
ADAGRAD_KERNELS_INLINE void affine_rows(const T* g, const T* x, T* dx, int64_t n, int64_t rows,
                                        int64_t stride, const T* __restrict__ a,
                                        const T* __restrict__ mean, const T* __restrict__ b,
                                        const T* __restrict__ d) {
  for (int64_t s = 0; s < rows; ++s) {
    const T* __restrict__ gs = g + s * stride, * __restrict__ xs = x + s * stride;
    T* __restrict__ out = dx + s * stride;
    for (int64_t c = 0; c < n; ++c) out[c] = a[c] * gs[c] + (b[c] * (xs[c] - mean[c]) + d[c]);
  }
}
