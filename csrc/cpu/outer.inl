// The weight gradient of a linear layer with one position a sample, and its coordinate sums:
//
//   grad[m, n] = sum over s of g[s, m] x[s, n]        grad_sq[m, n] = sum over s of g² x²
//
// two matrix products from one read of the operands (a sample's gradient is an outer product, so
// its square is the outer product of the squares).
//
// Cost model: a tile of MR rows by NV vectors loads MR + NV operands for MR * NV multiply-adds,
// twice as many with squares. x is packed in panels of kOuterWidth lanes and kOuterChunk samples,
// which stay in L1 while all rows pass by; g in panels of MR rows, read in order. Results go from
// registers to their place; only batches beyond one chunk read them again.

#include "vector.inl"

constexpr int kOuterVectors = kVectorBytes == 64 ? 2 : 64 / kVectorBytes;  // of a panel of x
template <class T>
constexpr int kOuterWidth = kOuterVectors * kLanes<T>;
constexpr int kOuterAccumulators = kVectorBytes == 64 ? 24 : 12;
template <bool SQUARES>
constexpr int kOuterRows = kOuterAccumulators / kOuterVectors / (SQUARES ? 2 : 1) > 0
                               ? kOuterAccumulators / kOuterVectors / (SQUARES ? 2 : 1)
                               : 1;
template <bool SQUARES>
constexpr int kOuterPacked = kOuterRows<SQUARES> * (SQUARES ? 2 : 1);  // g, then g²

// One tile: rows of g packed [s][kOuterPacked], x packed [s][kOuterWidth]; lanes of n are stored.
template <class T, bool SQUARES, int MR>
__attribute__((noinline)) void outer_tile(const T* g, const T* x, int64_t samples, int64_t lanes,
                                          bool add, int64_t stride, T* out, T* out_sq) {
  constexpr int NV = kOuterVectors, MR_ALL = kOuterRows<SQUARES>;
  Vector<T> acc[MR][NV] = {}, sq[MR][NV] = {};
  for (int64_t s = 0; s < samples; ++s) {
    Vector<T> v[NV], vv[NV];
#pragma GCC unroll 8
    for (int k = 0; k < NV; ++k) {
      v[k] = load(x + k * kLanes<T>);
      if (SQUARES) vv[k] = v[k] * v[k];
    }
#pragma GCC unroll 24
    for (int m = 0; m < MR; ++m) {
      const T a = g[m];
#pragma GCC unroll 8
      for (int k = 0; k < NV; ++k) {
        acc[m][k] += a * v[k];
        if (SQUARES) sq[m][k] += g[MR_ALL + m] * vv[k];
      }
    }
    g += kOuterPacked<SQUARES>;
    x += kOuterWidth<T>;
  }
  for (int which = 0; which < (SQUARES ? 2 : 1); ++which) {
    T* to = which ? out_sq : out;
    for (int m = 0; m < MR; ++m, to += stride) {
      const Vector<T>* from = which ? sq[m] : acc[m];
      if (lanes == kOuterWidth<T>) {
#pragma GCC unroll 8
        for (int k = 0; k < NV; ++k) {
          T* at = to + k * kLanes<T>;
          store(at, add ? load(at) + from[k] : from[k]);
        }
      } else {
        for (int64_t n = 0; n < lanes; ++n) {
          const T value = from[n / kLanes<T>][n % kLanes<T>];
          to[n] = add ? to[n] + value : value;
        }
      }
    }
  }
}

template <class T, bool SQUARES, int MR>
ADAGRAD_KERNELS_INLINE void outer_tile_of(int64_t rows, const T* g, const T* x, int64_t samples,
                                          int64_t lanes, bool add, int64_t stride, T* out,
                                          T* out_sq) {
  if constexpr (MR > 1) {
    if (rows < MR) {
      return outer_tile_of<T, SQUARES, MR - 1>(rows, g, x, samples, lanes, add, stride, out,
                                               out_sq);
    }
  }
  outer_tile<T, SQUARES, MR>(g, x, samples, lanes, add, stride, out, out_sq);
}

// Rows of g [samples, rows] for tiles [first, last) to [tile][s][kOuterPacked], missing rows zero.
template <class T, bool SQUARES>
ADAGRAD_KERNELS_INLINE void outer_pack(const Outer<T>& a, int64_t first, int64_t last, T* packed) {
  constexpr int MR = kOuterRows<SQUARES>;
  for (int64_t tile = first; tile < last; ++tile) {
    const int64_t m = tile * MR, rows = a.rows - m < MR ? a.rows - m : MR;
    T* out = packed + tile * a.samples * kOuterPacked<SQUARES>;
    for (int64_t s = 0; s < a.samples; ++s, out += kOuterPacked<SQUARES>) {
      const T* in = a.grad_out + s * a.rows + m;
      for (int64_t i = 0; i < rows; ++i) out[i] = in[i];
      for (int64_t i = rows; i < MR; ++i) out[i] = 0;
      if (!SQUARES) continue;
      for (int64_t i = 0; i < MR; ++i) out[MR + i] = out[i] * out[i];
    }
  }
}

// Panel `panel` of the columns and tiles [first, last) of the rows.
template <class T, bool SQUARES>
ADAGRAD_KERNELS_INLINE void outer_panel(const Outer<T>& a, const T* packed, int64_t panel,
                                        int64_t first, int64_t last, T* scratch) {
  constexpr int MR = kOuterRows<SQUARES>, W = kOuterWidth<T>;
  const int64_t n = panel * W, lanes = a.columns - n < W ? a.columns - n : W;
  for (int64_t s0 = 0; s0 < a.samples; s0 += kOuterChunk) {
    const int64_t samples = a.samples - s0 < kOuterChunk ? a.samples - s0 : kOuterChunk;
    for (int64_t s = 0; s < samples; ++s) {
      const T* in = a.input + (s0 + s) * a.columns + n;
      T* out = scratch + s * W;
      if (lanes == W) {
        for (int j = 0; j < W; ++j) out[j] = in[j];
      } else {
        for (int64_t j = 0; j < lanes; ++j) out[j] = in[j];
        for (int64_t j = lanes; j < W; ++j) out[j] = 0;
      }
    }
    for (int64_t tile = first; tile < last; ++tile) {
      const int64_t m = tile * MR, rows = a.rows - m < MR ? a.rows - m : MR;
      T* out = a.grad + m * a.columns + n;
      outer_tile_of<T, SQUARES, MR>(rows, packed + (tile * a.samples + s0) * kOuterPacked<SQUARES>,
                                    scratch, samples, lanes, s0 > 0, a.columns, out,
                                    SQUARES ? a.grad_sq + m * a.columns + n : nullptr);
    }
  }
}

#define ADAGRAD_KERNELS_INSTANTIATE(T)                                                     \
  OuterTiles outer_tiles(const Outer<T>& a) {                                              \
    const int64_t rows = a.grad_sq ? kOuterRows<true> : kOuterRows<false>;                 \
    const int64_t packed = a.grad_sq ? kOuterPacked<true> : kOuterPacked<false>;           \
    return {packed, (a.rows + rows - 1) / rows, kOuterWidth<T>,                            \
            (a.columns + kOuterWidth<T> - 1) / kOuterWidth<T>};                            \
  }                                                                                        \
  void outer_pack_range(const Outer<T>& a, int64_t first, int64_t last, T* packed) {       \
    a.grad_sq ? outer_pack<T, true>(a, first, last, packed)                                \
              : outer_pack<T, false>(a, first, last, packed);                              \
  }                                                                                        \
  void outer_panel_range(const Outer<T>& a, const T* packed, int64_t panel, int64_t first, \
                         int64_t last, T* scratch) {                                       \
    a.grad_sq ? outer_panel<T, true>(a, packed, panel, first, last, scratch)               \
              : outer_panel<T, false>(a, packed, panel, first, last, scratch);             \
  }
ADAGRAD_KERNELS_INSTANTIATE(float)
ADAGRAD_KERNELS_INSTANTIATE(double)
#undef ADAGRAD_KERNELS_INSTANTIATE
