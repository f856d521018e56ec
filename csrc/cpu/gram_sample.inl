// Squared norms of samples' gradients without the gradients, for samples of few positions:
//
//   |Σ_t u_t v_tᵀ|² = Σ_{t,t'} <u_t, u_t'> <v_t, v_t'>
//
// Cost: T² (U + V) / 2 multiply-adds a sample, against 2 to 3 vector operations for each of the
// U V elements of a gradient that is formed.

#include "vector.inl"

constexpr int kGramBlock = kVectorBytes == 64 ? 4 : 2;

// All products of kGramBlock rows with kGramBlock rows, n long.
template <class T>
ADAGRAD_KERNELS_INLINE void gram_block(const T* const* a, const T* const* b, int64_t n,
                                       T out[kGramBlock][kGramBlock]) {
  constexpr int B = kGramBlock;
  Vector<T> acc[B][B] = {};
  int64_t j = 0;
  for (; j + kLanes<T> <= n; j += kLanes<T>) {
    Vector<T> y[B];
#pragma GCC unroll 4
    for (int k = 0; k < B; ++k) y[k] = load(b[k] + j);
#pragma GCC unroll 4
    for (int i = 0; i < B; ++i) {
      const Vector<T> x = load(a[i] + j);
#pragma GCC unroll 4
      for (int k = 0; k < B; ++k) acc[i][k] += x * y[k];
    }
  }
  for (int i = 0; i < B; ++i) {
    for (int k = 0; k < B; ++k) {
      out[i][k] = sum_of_lanes<T>(acc[i][k]);
      for (int64_t r = j; r < n; ++r) out[i][k] += a[i][r] * b[k][r];
    }
  }
}

template <class T>
ADAGRAD_KERNELS_INLINE double gram_sample(const T* u, int64_t nu, const T* v, int64_t nv,
                                          int64_t positions) {
  constexpr int B = kGramBlock;
  double total = 0;
  for (int64_t first = 0; first < positions; first += B) {
    for (int64_t second = first; second < positions; second += B) {
      // Rows beyond the last repeat it and are not counted.
      const T *ua[B], *ub[B], *va[B], *vb[B];
      for (int i = 0; i < B; ++i) {
        const int64_t p = first + i < positions ? first + i : positions - 1;
        const int64_t q = second + i < positions ? second + i : positions - 1;
        ua[i] = u + p * nu, va[i] = v + p * nv;
        ub[i] = u + q * nu, vb[i] = v + q * nv;
      }
      T left[B][B], right[B][B];
      gram_block(ua, ub, nu, left);
      gram_block(va, vb, nv, right);
      double part = 0;
      for (int i = 0; i < B && first + i < positions; ++i) {
        for (int k = 0; k < B && second + k < positions; ++k) {
          part += static_cast<double>(left[i][k]) * right[i][k];
        }
      }
      total += first == second ? part : 2 * part;
    }
  }
  return total > 0 ? total : 0;
}
