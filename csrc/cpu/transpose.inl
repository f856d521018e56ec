// Matrices to their transposes, with strides: what packs and unpacks the panels of weight_grad.inl.

// [lanes][t] with t contiguous to [t][width], element by element or in blocks of kBlock x kBlock.
template <class T>
ADAGRAD_KERNELS_INLINE void transpose_elements(const T* in, int64_t lane_stride, int64_t positions,
                                               int64_t lanes, int64_t width, T* out) {
  for (int64_t n = 0; n < lanes; ++n) {
    for (int64_t t = 0; t < positions; ++t) out[t * width + n] = in[n * lane_stride + t];
  }
}

#if defined(__GNUC__) && !defined(__clang__)
template <int kBlock>
struct Block {
  using V = typename VectorOf<float, 4 * kBlock>::type;
  using I = typename VectorOf<int, 4 * kBlock>::type;
  V row[kBlock];

  // Pairs of rows that are `step` apart: runs of `step` elements exchange places.
  template <int step>
  ADAGRAD_KERNELS_INLINE void exchange() {
    I low, high;
    for (int e = 0; e < kBlock; ++e) {
      const bool second = e & step;
      low[e] = second ? kBlock + e - step : e;
      high[e] = second ? kBlock + e : e + step;
    }
#pragma GCC unroll 8
    for (int r = 0; r < kBlock; ++r) {
      if (r & step) continue;
      const V a = row[r], b = row[r + step];
      row[r] = __builtin_shuffle(a, b, low);
      row[r + step] = __builtin_shuffle(a, b, high);
    }
  }
};

template <int kBlock>
ADAGRAD_KERNELS_INLINE void transpose_blocks(const float* in, int64_t lane_stride,
                                             int64_t positions, int64_t lanes, int64_t width,
                                             float* out) {
  int64_t n = 0;
  for (; n + kBlock <= lanes; n += kBlock) {
    const float* from = in + n * lane_stride;
    int64_t t = 0;
    for (; t + kBlock <= positions; t += kBlock) {
      Block<kBlock> b;
#pragma GCC unroll 8
      for (int i = 0; i < kBlock; ++i) {
        __builtin_memcpy(&b.row[i], from + i * lane_stride + t, sizeof(b.row[i]));
      }
      b.template exchange<1>();
      b.template exchange<2>();
      if constexpr (kBlock > 4) b.template exchange<4>();
#pragma GCC unroll 8
      for (int i = 0; i < kBlock; ++i) {
        __builtin_memcpy(out + (t + i) * width + n, &b.row[i], sizeof(b.row[i]));
      }
    }
    if constexpr (kBlock > 4) {
      transpose_blocks<4>(from + t, lane_stride, positions - t, kBlock, width, out + t * width + n);
    } else {
      transpose_elements(from + t, lane_stride, positions - t, kBlock, width, out + t * width + n);
    }
  }
  transpose_elements(in + n * lane_stride, lane_stride, positions, lanes - n, width, out + n);
}
#endif

template <class T>
ADAGRAD_KERNELS_INLINE void pack_transposed(const T* in, int64_t lane_stride, int64_t positions,
                                            int64_t lanes, int64_t width, T* out) {
#if defined(__GNUC__) && !defined(__clang__)
  if constexpr (sizeof(T) == 4) {
    transpose_blocks<kVectorBytes >= 32 ? 8 : 4>(in, lane_stride, positions, lanes, width, out);
    return;
  }
#endif
  transpose_elements(in, lane_stride, positions, lanes, width, out);
}
