// Included inside one instruction set's namespace: vectors of kVectorBytes, spelled with the
// compilers' vector extension so that one source serves every set.

template <class T, int kBytes = kVectorBytes>
struct VectorOf {
  typedef T type __attribute__((vector_size(kBytes)));
};
template <class T>
using Vector = typename VectorOf<T>::type;

template <class T>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));

template <class T>
ADAGRAD_KERNELS_INLINE Vector<T> load(const T* p) {
  Vector<T> v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}

template <class T>
ADAGRAD_KERNELS_INLINE void store(T* p, Vector<T> v) {
  __builtin_memcpy(p, &v, sizeof(v));
}

// By halves: four additions for sixteen lanes, one after the other.
template <class T, int kBytes = kVectorBytes>
ADAGRAD_KERNELS_INLINE T sum_of_lanes(typename VectorOf<T, kBytes>::type v) {
  if constexpr (kBytes == 2 * sizeof(T)) {
    return v[0] + v[1];
  } else {
    typename VectorOf<T, kBytes / 2>::type low, high;
    __builtin_memcpy(&low, &v, sizeof(low));
    __builtin_memcpy(&high, reinterpret_cast<const char*>(&v) + sizeof(low), sizeof(high));
    return sum_of_lanes<T, kBytes / 2>(low + high);
  }
}
