// AdaGrad's update and the reductions of the tests, in one pass over memory.
//
// Blocks of kBlock elements: the norm is summed during the update; with coordinate sums the update
// runs first and brings the block into L1, then the reductions read it from there. Traffic: param,
// grad, sum read, param and sum written, 20 bytes an element (24 with coordinate sums), the same as
// an update without reductions.

#include "../common/adagrad_math.inl"
#include "vector.inl"

constexpr int64_t kBlock = 1024;

// Adds a block's sums over g = grad_scale * grad.
template <class T>
ADAGRAD_KERNELS_INLINE void reduce_block(const T* grad, const T* coordinate_sums,
                                         const T* denominators, int64_t n, const AdagradOptions& o,
                                         AdagradReductions* out) {
  const T scale = static_cast<T>(o.grad_scale);
  const VarianceFactors<T> factors = variance_factors<T>(o.grad_scale, o.samples);
  Vector<T> norm = {};
  CoordinateReductions<Vector<T>> r = {};
  T tail_g[kLanes<T>] = {}, tail_c[kLanes<T>] = {}, tail_d[kLanes<T>];
  for (int64_t j = 0; j < n; j += kLanes<T>) {
    const T* pg = grad + j;
    const T* pc = coordinate_sums ? coordinate_sums + j : nullptr;
    const T* pd = denominators ? denominators + j : nullptr;
    if (n - j < kLanes<T>) {  // the last lanes of the tensor: padded with zero gradients
      for (int i = 0; i < kLanes<T>; ++i) tail_d[i] = 1;
      for (int64_t i = 0; i < n - j; ++i) {
        tail_g[i] = pg[i];
        if (!coordinate_sums) continue;
        tail_c[i] = pc[i];
        tail_d[i] = pd[i];
      }
      pg = tail_g, pc = tail_c, pd = tail_d;
    }
    const Vector<T> g = scale * load(pg), gg = g * g;
    norm += gg;
    if (!coordinate_sums) continue;
    add_coordinate(gg, load(pc), load(pd), factors, r);
  }
  out->grad_norm_sq += sum_of_lanes<T>(norm);
  if (!coordinate_sums) return;
  out->variance_sum += sum_of_lanes<T>(r.variance);
  out->variance_metric += sum_of_lanes<T>(r.variance_metric);
  out->grad_metric += sum_of_lanes<T>(r.grad_metric);
  for (int i = 0; i < kLanes<T>; ++i) {
    if (r.ratio[i] > out->max_ratio) out->max_ratio = r.ratio[i];
  }
}

template <class T>
ADAGRAD_KERNELS_INLINE AdagradReductions update(T* __restrict__ param, const T* __restrict__ grad,
                                                T* __restrict__ sum,
                                                const T* __restrict__ coordinate_sums, int64_t n,
                                                const AdagradOptions& o) {
  const T lr = static_cast<T>(o.lr), eps = static_cast<T>(o.eps);
  const T decay = static_cast<T>(o.weight_decay);
  const T scale = static_cast<T>(o.maximize ? -o.grad_scale : o.grad_scale);
  AdagradReductions out;
  T denominators[kBlock];
  // Sums of few elements are exact enough even where they are not added up in many lanes.
  const int64_t block = coordinate_sums ? kBlock : kBlock / 4;
  for (int64_t first = 0; first < n; first += block) {
    const int64_t size = n - first < block ? n - first : block;
    T* p = param + first;
    T* v = sum + first;
    const T* d = grad + first;
    if (coordinate_sums) {
      for (int64_t j = 0; j < size; ++j) {
        const T g = scale * d[j] + decay * p[j];
        denominators[j] = adagrad_element(p[j], v[j], g, lr, eps);
      }
      reduce_block<T>(d, coordinate_sums + first, denominators, size, o, &out);
      continue;
    }
    T norm = 0;
#pragma omp simd reduction(+ : norm)
    for (int64_t j = 0; j < size; ++j) {
      const T g = scale * d[j];
      norm += g * g;
      adagrad_element(p[j], v[j], g + decay * p[j], lr, eps);
    }
    out.grad_norm_sq += norm;
  }
  return out;
}

template <class T>
ADAGRAD_KERNELS_INLINE AdagradReductions norm_reduce(const T* param, const T* grad, int64_t n,
                                                     const AdagradOptions& o) {
  const T decay = static_cast<T>(o.weight_decay);
  const T scale = static_cast<T>(o.maximize ? -o.grad_scale : o.grad_scale);
  AdagradReductions out;
  for (int64_t first = 0; first < n; first += kBlock) {
    const int64_t size = n - first < kBlock ? n - first : kBlock;
    reduce_block<T>(grad + first, nullptr, nullptr, size, o, &out);
    if (decay == 0) continue;
    T part = 0;
    for (int64_t j = first; j < first + size; ++j) {
      const T g = scale * grad[j] + decay * param[j];
      part += g * g;
    }
    out.decayed_norm_sq += part;
  }
  if (decay == 0) out.decayed_norm_sq = out.grad_norm_sq;
  return out;
}

template <class T>
ADAGRAD_KERNELS_INLINE AdagradReductions norm_update(T* __restrict__ param,
                                                     const T* __restrict__ grad,
                                                     const T* __restrict__ coordinate_sums,
                                                     int64_t n, double denominator,
                                                     const AdagradOptions& o) {
  const T step = static_cast<T>(o.lr / denominator), decay = static_cast<T>(o.weight_decay);
  const T scale = static_cast<T>(o.maximize ? -o.grad_scale : o.grad_scale);
  AdagradReductions out;
  T denominators[kBlock];
  for (int64_t j = 0; j < kBlock; ++j) denominators[j] = static_cast<T>(denominator);
  for (int64_t first = 0; first < n; first += kBlock) {
    const int64_t size = n - first < kBlock ? n - first : kBlock;
    for (int64_t j = first; j < first + size; ++j) {
      param[j] -= step * (scale * grad[j] + decay * param[j]);
    }
    if (coordinate_sums) {
      reduce_block<T>(grad + first, coordinate_sums + first, denominators, size, o, &out);
    }
  }
  return out;
}

#define ADAGRAD_KERNELS_INSTANTIATE(T)                                                           \
  AdagradReductions adagrad_range(T* param, const T* grad, T* sum, const T* coordinate_sums,     \
                                  int64_t n, const AdagradOptions& o) {                          \
    return update<T>(param, grad, sum, coordinate_sums, n, o);                                   \
  }                                                                                              \
  AdagradReductions adagrad_norm_reduce_range(const T* param, const T* grad, int64_t n,          \
                                              const AdagradOptions& o) {                         \
    return norm_reduce<T>(param, grad, n, o);                                                    \
  }                                                                                              \
  AdagradReductions adagrad_norm_update_range(T* param, const T* grad, const T* coordinate_sums, \
                                              int64_t n, double denominator,                     \
                                              const AdagradOptions& o) {                         \
    return norm_update<T>(param, grad, coordinate_sums, n, denominator, o);                      \
  }
ADAGRAD_KERNELS_INSTANTIATE(float)
ADAGRAD_KERNELS_INSTANTIATE(double)
#undef ADAGRAD_KERNELS_INSTANTIATE
