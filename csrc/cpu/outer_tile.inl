// Tiles of sums of outer products, which the gradient of a linear layer (outer.inl) and its update
// (linear_update.inl) are made of:
//
//   sum[m, n] = sum over s of g[s, m] x[s, n]        sum_sq[m, n] = sum over s of g² x²
//
// Cost model: a tile of MR rows by NV vectors loads MR + NV operands for MR * NV multiply-adds,
// twice as many with squares.

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

// Samples [first, first + samples) of panel `panel` of the columns of x [samples, columns] to
// [s][kOuterWidth], missing columns zero.
template <class T>
ADAGRAD_KERNELS_INLINE void outer_pack_panel(const Outer<T>& a, int64_t panel, int64_t first,
                                             int64_t samples, T* packed) {
  constexpr int W = kOuterWidth<T>;
  const int64_t n = panel * W, lanes = a.columns - n < W ? a.columns - n : W;
  for (int64_t s = 0; s < samples; ++s) {
    const T* in = a.input + (first + s) * a.columns + n;
    T* out = packed + s * W;
    if (lanes == W) {
      for (int j = 0; j < W; ++j) out[j] = in[j];
    } else {
      for (int64_t j = 0; j < lanes; ++j) out[j] = in[j];
      for (int64_t j = lanes; j < W; ++j) out[j] = 0;
    }
  }
}
