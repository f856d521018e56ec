// AdaGrad's update of a linear layer's weight inside its weight gradient: a tile of the gradient is
// summed as in outer.inl, and before it leaves L1, weight and accumulator are updated with it.
//
// Traffic: weight and accumulator read and written, 16 bytes a float32 parameter, where a gradient
// that is written and read again makes 24. Hence a few rows at a time outside and the panels of x,
// which stay in L2 where samples are few, inside: weight and accumulator pass by in order.

#include "../common/adagrad_math.inl"
#include "outer_tile.inl"

// One row of a tile: w, v [W] with gradient g, not yet scaled. Adds g² to norm, by lane, and leaves
// the denominators in root.
template <class T>
ADAGRAD_KERNELS_INLINE void update_row(T* __restrict__ w, T* __restrict__ v,
                                       const T* __restrict__ g, const AdagradOptions& o,
                                       T* __restrict__ norm, T* __restrict__ root) {
  const T lr = static_cast<T>(o.lr), eps = static_cast<T>(o.eps);
  const T decay = static_cast<T>(o.weight_decay);
  const T scale = static_cast<T>(o.maximize ? -o.grad_scale : o.grad_scale);
#pragma omp simd
  for (int j = 0; j < kOuterWidth<T>; ++j) {
    const T scaled = scale * g[j];
    norm[j] += scaled * scaled;
    root[j] = adagrad_element(w[j], v[j], scaled + decay * w[j], lr, eps);
  }
}

// The rows of one finished tile: sums and, with SQUARES, sums of squares [rows][W].
template <class T, bool SQUARES>
ADAGRAD_KERNELS_INLINE void update_tile(const LinearUpdate<T>& a, int64_t m, int64_t rows,
                                        int64_t n, const T* g, const T* squares,
                                        AdagradReductions* out) {
  constexpr int W = kOuterWidth<T>;
  const int64_t columns = a.product.columns, lanes = columns - n < W ? columns - n : W;
  const VarianceFactors<T> factors = variance_factors<T>(a.options.grad_scale, a.options.samples);
  const T scale = static_cast<T>(a.options.grad_scale);
  T norm[W] = {}, root[W], tail_w[W] = {}, tail_v[W];
  for (int j = 0; j < W; ++j) tail_v[j] = 1;
  CoordinateReductions<Vector<T>> r = {};
  for (int64_t i = 0; i < rows; ++i, g += W, squares += W) {
    const int64_t at = (m + i) * columns + n;
    T *w = a.weight + at, *v = a.sum + at;
    if (lanes == W) {
      update_row<T>(w, v, g, a.options, norm, root);
    } else {
      for (int64_t j = 0; j < lanes; ++j) tail_w[j] = w[j], tail_v[j] = v[j];
      update_row<T>(tail_w, tail_v, g, a.options, norm, root);
      for (int64_t j = 0; j < lanes; ++j) w[j] = tail_w[j], v[j] = tail_v[j];
    }
    if (!SQUARES) continue;
    for (int64_t j = 0; j < lanes; ++j) a.product.grad_sq[at + j] = squares[j];
    for (int j = 0; j < W; j += kLanes<T>) {
      const Vector<T> scaled = scale * load(g + j);
      add_coordinate(scaled * scaled, load(squares + j), load(root + j), factors, r);
    }
  }
  for (int j = 0; j < W; ++j) out->grad_norm_sq += norm[j];
  if (!SQUARES) return;
  out->variance_sum += sum_of_lanes<T>(r.variance);
  out->variance_metric += sum_of_lanes<T>(r.variance_metric);
  out->grad_metric += sum_of_lanes<T>(r.grad_metric);
  for (int i = 0; i < kLanes<T>; ++i) {
    if (r.ratio[i] > out->max_ratio) out->max_ratio = r.ratio[i];
  }
}

// Has the rows of a tile on their way from memory while the tile is summed: they are too many for
// the processor to foresee.
template <class T>
ADAGRAD_KERNELS_INLINE void prefetch_tile(const LinearUpdate<T>& a, int64_t m, int64_t rows,
                                          int64_t n) {
  constexpr int64_t kLine = 64 / sizeof(T);
  const int64_t columns = a.product.columns;
  const int64_t end = n + kOuterWidth<T> < columns ? n + kOuterWidth<T> : columns;
  for (int64_t i = m; i < m + rows; ++i) {
    for (int64_t j = n; j < end; j += kLine) {
      __builtin_prefetch(a.weight + i * columns + j, 1);
      __builtin_prefetch(a.sum + i * columns + j, 1);
    }
  }
}

template <class T, bool SQUARES>
ADAGRAD_KERNELS_INLINE AdagradReductions linear_update(const LinearUpdate<T>& a, const T* grad_out,
                                                       const T* input, int64_t first, int64_t last,
                                                       T* scratch) {
  constexpr int MR = kOuterRows<SQUARES>, W = kOuterWidth<T>, kTile = MR * W;
  static_assert(2 * kTile <= kTileScratch);
  const Outer<T>& p = a.product;
  AdagradReductions total;
  for (int64_t n = 0; n < p.columns; n += W) {
    for (int64_t s0 = 0; s0 < p.samples; s0 += kOuterChunk) {
      const int64_t samples = p.samples - s0 < kOuterChunk ? p.samples - s0 : kOuterChunk;
      for (int64_t tile = first; tile < last; ++tile) {
        const int64_t m = tile * MR, rows = p.rows - m < MR ? p.rows - m : MR;
        T* g = scratch + (tile - first) * 2 * kTile;
        const bool finished = s0 + samples == p.samples;
        if (finished) prefetch_tile(a, m, rows, n);
        outer_tile_of<T, SQUARES, MR>(
            rows, grad_out + (tile * p.samples + s0) * kOuterPacked<SQUARES>,
            input + n * p.samples + s0 * W, samples, W, s0 > 0, W, g, g + kTile);
        if (finished) update_tile<T, SQUARES>(a, m, rows, n, g, g + kTile, &total);
      }
    }
  }
  return total;
}

#define ADAGRAD_KERNELS_INSTANTIATE(T)                                                             \
  void linear_update_pack_range(const Outer<T>& a, int64_t first, int64_t last, T* packed) {       \
    for (int64_t panel = first; panel < last; ++panel) {                                           \
      outer_pack_panel(a, panel, 0, a.samples, packed + panel * a.samples * kOuterWidth<T>);       \
    }                                                                                              \
  }                                                                                                \
  AdagradReductions linear_update_range(const LinearUpdate<T>& a, const T* grad_out,               \
                                        const T* input, int64_t first, int64_t last, T* scratch) { \
    return a.product.grad_sq ? linear_update<T, true>(a, grad_out, input, first, last, scratch)    \
                             : linear_update<T, false>(a, grad_out, input, first, last, scratch);  \
  }
ADAGRAD_KERNELS_INSTANTIATE(float)
ADAGRAD_KERNELS_INSTANTIATE(double)
#undef ADAGRAD_KERNELS_INSTANTIATE
