// What the layer ops share: scratch memory, outputs, the probe.
#pragma once

#include <algorithm>
#include <memory>
#include <vector>

#include "kernels.h"
#include "ops.h"

namespace adagrad_kernels {

using torch::stable::get_num_threads;
using torch::stable::new_empty;
using torch::stable::new_zeros;
using torch::stable::parallel_for;

// Memory aligned for full vectors, not initialised.
template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t n) : memory_(new T[n + 64 / sizeof(T)]) {
    const auto address = reinterpret_cast<uintptr_t>(memory_.get());
    aligned_ = reinterpret_cast<T*>((address + 63) / 64 * 64);
  }
  T* get() const { return aligned_; }

 private:
  std::unique_ptr<T[]> memory_;
  T* aligned_;
};

struct Outputs {
  Tensor grad, grad_sq;            // grad_sq empty without coordinates
  Tensor wide_grad, wide_grad_sq;  // the bias of a convolution, or empty
};

inline Tensor make_probe(const Tensor& like, int64_t capacity, int64_t samples) {
  STD_TORCH_CHECK(samples <= capacity, "adagrad_kernels: ", samples,
                  " samples do not fit a probe of capacity ", capacity);
  return new_empty(like, {2, capacity});
}

// Row 0: norms, row 1: one call for each of the samples; zero beyond them.
template <class T, class Norm>
void fill_probe(const Tensor& probe, int64_t samples, const Norm& norm) {
  const int64_t capacity = probe.size(1);
  T* out = data<T>(probe);
  for (int64_t i = 0; i < samples; ++i) out[i] = norm(i);
  std::fill(out + samples, out + capacity, T(0));
  std::fill(out + capacity, out + capacity + samples, T(1));
  std::fill(out + capacity + samples, out + 2 * capacity, T(0));
}

template <class T>
void add_parts(const T* parts, int64_t stride, int64_t count, T* out, int64_t n) {
  for (int64_t p = 0; p < count; ++p) {
    for (int64_t j = 0; j < n; ++j) out[j] += parts[p * stride + j];
  }
}

}  // namespace adagrad_kernels
