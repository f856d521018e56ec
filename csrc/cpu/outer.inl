// The weight gradient of a linear layer with one position a sample, and its coordinate sums:
//
//   grad[m, n] = sum over s of g[s, m] x[s, n]        grad_sq[m, n] = sum over s of g² x²
//
// two matrix products from one read of the operands (a sample's gradient is an outer product, so
// its square is the outer product of the squares).
//
// x is packed in panels of kOuterWidth lanes and kOuterChunk samples, which stay in L1 while all
// rows pass by; g in panels of MR rows, read in order. Results go from registers to their place;
// only batches beyond one chunk read them again.

#include "outer_tile.inl"

// Panel `panel` of the columns and tiles [first, last) of the rows.
template <class T, bool SQUARES>
ADAGRAD_KERNELS_INLINE void outer_panel(const Outer<T>& a, const T* packed, int64_t panel,
                                        int64_t first, int64_t last, T* scratch) {
  constexpr int MR = kOuterRows<SQUARES>, W = kOuterWidth<T>;
  const int64_t n = panel * W, lanes = a.columns - n < W ? a.columns - n : W;
  for (int64_t s0 = 0; s0 < a.samples; s0 += kOuterChunk) {
    const int64_t samples = a.samples - s0 < kOuterChunk ? a.samples - s0 : kOuterChunk;
    outer_pack_panel(a, panel, s0, samples, scratch);
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
