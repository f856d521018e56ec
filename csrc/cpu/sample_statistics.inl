// One pass over columns [first, last) of g [rows, stride]: column sums, column sums of
// squares, and the part of every row's squared norm that these columns hold.
//
// Cost: g is read once. Blocks of kBlock columns keep both running sums in L1; two rows
// at a time share their loads and stores. Rounding: runs of kRows rows are summed by themselves,
// so that the error grows with kRows + rows / kRows and not with rows.

#include "vector.inl"

constexpr int64_t kRows = 64;

// Adds rows of n columns; norms_sq[i] is that of row i.
template <class T>
ADAGRAD_KERNELS_INLINE void add_rows(const T* g, int64_t rows, int64_t stride, int64_t n, T* sum,
                                     T* sum_sq, double* norms_sq) {
  int64_t i = 0;
  for (; i + 1 < rows; i += 2) {
    const T* a = g + i * stride;
    const T* b = a + stride;
    Vector<T> na = {}, nb = {};
    int64_t j = 0;
    for (; j + kLanes<T> <= n; j += kLanes<T>) {
      const Vector<T> x = load(a + j), y = load(b + j);
      const Vector<T> xx = x * x, yy = y * y;
      store(sum + j, load(sum + j) + (x + y));
      store(sum_sq + j, load(sum_sq + j) + (xx + yy));
      na += xx;
      nb += yy;
    }
    double ta = sum_of_lanes<T>(na);
    double tb = sum_of_lanes<T>(nb);
    for (; j < n; ++j) {
      sum[j] += a[j] + b[j];
      sum_sq[j] += a[j] * a[j] + b[j] * b[j];
      ta += a[j] * a[j];
      tb += b[j] * b[j];
    }
    norms_sq[i] += ta;
    norms_sq[i + 1] += tb;
  }
  if (i < rows) {
    const T* a = g + i * stride;
    double ta = 0;
    for (int64_t j = 0; j < n; ++j) {
      sum[j] += a[j];
      sum_sq[j] += a[j] * a[j];
      ta += static_cast<double>(a[j]) * a[j];
    }
    norms_sq[i] += ta;
  }
}

template <class T>
ADAGRAD_KERNELS_INLINE void columns(const T* g, int64_t rows, int64_t stride, int64_t first,
                                    int64_t last, T* sum, T* sum_sq, double* norms_sq) {
  constexpr int64_t kBlock = 8192 / sizeof(T);
  T run_sum[kBlock], run_sum_sq[kBlock];
  for (int64_t j = first; j < last; ++j) sum[j] = sum_sq[j] = 0;
  for (int64_t block = first; block < last; block += kBlock) {
    const int64_t n = last - block < kBlock ? last - block : kBlock;
    if (rows <= kRows) {
      add_rows(g + block, rows, stride, n, sum + block, sum_sq + block, norms_sq);
      continue;
    }
    for (int64_t i = 0; i < rows; i += kRows) {
      for (int64_t j = 0; j < n; ++j) run_sum[j] = run_sum_sq[j] = 0;
      add_rows(g + i * stride + block, rows - i < kRows ? rows - i : kRows, stride, n, run_sum,
               run_sum_sq, norms_sq + i);
      for (int64_t j = 0; j < n; ++j) {
        sum[block + j] += run_sum[j];
        sum_sq[block + j] += run_sum_sq[j];
      }
    }
  }
}

#define ADAGRAD_KERNELS_INSTANTIATE(T)                                                  \
  void sample_statistics_range(const T* g, int64_t rows, int64_t stride, int64_t first, \
                               int64_t last, T* sum, T* sum_sq, double* norms_sq) {     \
    columns<T>(g, rows, stride, first, last, sum, sum_sq, norms_sq);                    \
  }
ADAGRAD_KERNELS_INSTANTIATE(float)
ADAGRAD_KERNELS_INSTANTIATE(double)
#undef ADAGRAD_KERNELS_INSTANTIATE
