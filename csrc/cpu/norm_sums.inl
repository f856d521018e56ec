// Included by scale.inl and norm_backward.inl: a sample's gradients of scale and shift by channel,
// and how they enter the statistics.

#include "vector.inl"

// Sums over j of g and of g * (x - mean), n contiguous elements of one channel; x may be null.
// U vectors at a time, the rest one at a time.
template <class T>
struct ChannelSums {
  T scale, shift;
};
template <class T, int U>
ADAGRAD_KERNELS_INLINE ChannelSums<T> unrolled_sums(const T* g, const T* x, T mean, int64_t n) {
  constexpr int kL = kLanes<T>;
  Vector<T> a[U] = {}, b[U] = {};
  int64_t j = 0;
  for (; j + U * kL <= n; j += U * kL) {
    for (int k = 0; k < U; ++k) {
      const Vector<T> v = load(g + j + k * kL);
      b[k] += v;
      if (x) a[k] += v * (load(x + j + k * kL) - mean);
    }
  }
  for (int k = 1; k < U; ++k) a[0] += a[k], b[0] += b[k];
  for (; U > 1 && j + kL <= n; j += kL) {
    const Vector<T> v = load(g + j);
    b[0] += v;
    if (x) a[0] += v * (load(x + j) - mean);
  }
  ChannelSums<T> sums = {0, 0};
  if (j > 0) sums = {x ? sum_of_lanes<T>(a[0]) : T(0), sum_of_lanes<T>(b[0])};
  for (; j < n; ++j) {
    sums.shift += g[j];
    if (x) sums.scale += g[j] * (x[j] - mean);
  }
  return sums;
}
template <class T>
ADAGRAD_KERNELS_INLINE ChannelSums<T> channel_sums(const T* g, const T* x, T mean, int64_t n) {
  return n < 8 * kLanes<T> ? unrolled_sums<T, 1>(g, x, mean, n)
                           : unrolled_sums<T, 4>(g, x, mean, n);
}

// A sample's gradient [n] into the sums over samples and into its norm; sum may be null.
template <class T>
ADAGRAD_KERNELS_INLINE void add_sample(const T* sample, int64_t n, T* sum, T* sum_sq,
                                       double* norm) {
  if (!sum) return;
  constexpr int kL = kLanes<T>;
  double total = 0;
  for (int64_t first = 0; first < n; first += 1024) {
    const int64_t end = first + 1024 < n ? first + 1024 : n;
    Vector<T> part[2] = {};
    int64_t c = first;
    for (; c + 2 * kL <= end; c += 2 * kL) {
      for (int k = 0; k < 2; ++k) {
        const Vector<T> v = load(sample + c + k * kL), square = v * v;
        store(sum + c + k * kL, load(sum + c + k * kL) + v);
        if (sum_sq) store(sum_sq + c + k * kL, load(sum_sq + c + k * kL) + square);
        part[k] += square;
      }
    }
    T rest = sum_of_lanes<T>(part[0] + part[1]);
    for (; c < end; ++c) {
      const T square = sample[c] * sample[c];
      sum[c] += sample[c];
      if (sum_sq) sum_sq[c] += square;
      rest += square;
    }
    total += rest;
  }
  *norm += total;
}
