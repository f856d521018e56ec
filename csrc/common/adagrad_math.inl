// AdaGrad's arithmetic for one element, the same on CPU and GPU. T is float or double; V is T,
// or on the CPU a vector of T. No include guard: each instruction set's namespace includes it,
// and each .cu file, after ADAGRAD_KERNELS_INLINE is defined.

ADAGRAD_KERNELS_INLINE float root_of(float x) {
#ifdef __CUDA_ARCH__
  return sqrtf(x);
#else
  return __builtin_sqrtf(x);
#endif
}
ADAGRAD_KERNELS_INLINE double root_of(double x) {
#ifdef __CUDA_ARCH__
  return sqrt(x);
#else
  return __builtin_sqrt(x);
#endif
}

// v <- v + d^2, w <- w - lr d / (sqrt(v) + eps). Returns the denominator.
template <class T>
ADAGRAD_KERNELS_INLINE T adagrad_element(T& param, T& sum, T d, T lr, T eps) {
  sum += d * d;
  const T denominator = root_of(sum) + eps;
  param -= lr * d / denominator;
  return denominator;
}

// The factors of var_j = (N^2 s^2 C_j - N g_j^2) / (N - 1), where g is scaled by s and
// C_j is the sum over samples of unscaled contributions squared.
template <class T>
struct VarianceFactors {
  T coordinate_sum, square;
};
template <class T>
ADAGRAD_KERNELS_INLINE VarianceFactors<T> variance_factors(double grad_scale, double samples) {
  const double b = samples / (samples - 1);
  return {static_cast<T>(grad_scale * grad_scale * samples * b), static_cast<T>(b)};
}

template <class V>
struct CoordinateReductions {
  V variance, ratio, variance_metric, grad_metric;  // see AdagradReductions
};
// Adds one coordinate with square = g_j^2. A NaN stays one in the sums.
template <class V, class T>
ADAGRAD_KERNELS_INLINE void add_coordinate(V square, V coordinate_sum, V denominator,
                                           const VarianceFactors<T>& factors,
                                           CoordinateReductions<V>& r) {
  const V zero = {};
  const V difference = factors.coordinate_sum * coordinate_sum - factors.square * square;
  const V variance = difference < zero ? zero : difference;
  const V ratio = variance > zero ? variance / square : zero;
  const V inverse = static_cast<T>(1) / denominator;
  r.variance += variance;
  r.ratio = ratio > r.ratio ? ratio : r.ratio;
  r.variance_metric += variance * inverse;
  r.grad_metric += square * inverse;
}
