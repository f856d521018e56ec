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

// The most tasks that one op is split into. The split depends on the shapes alone, not on the
// number of threads: so do the results.
constexpr int64_t kTasks = 16;

// total[0, n) = what kernel(first, last, sums, scratch) adds to sums [n] over all samples. Runs of
// kRun samples are summed by themselves, so that rounding errors do not grow with the batch.
// work: elements that are read.
template <class T, class Kernel>
void sum_over_samples(int64_t samples, int64_t work, int64_t n, int64_t scratch, T* total,
                      const Kernel& kernel) {
  constexpr int64_t kRun = 64, kWork = 32768;
  const int64_t parts = std::clamp<int64_t>(std::min(work / kWork, samples), 1, kTasks);
  const int64_t own_size = 2 * n + scratch;
  Scratch<T> buffers(parts * own_size);
  parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      T* own = buffers.get() + p * own_size;
      T* run = own + n;
      std::fill(own, run, T(0));
      const int64_t last = samples * (p + 1) / parts;
      for (int64_t first = samples * p / parts; first < last; first += kRun) {
        std::fill(run, run + n, T(0));
        kernel(first, std::min(first + kRun, last), run, run + n);
        add_parts(run, 0, 1, own, n);
      }
    }
  });
  std::fill(total, total + n, T(0));
  add_parts(buffers.get(), own_size, parts, total, n);
}

}  // namespace adagrad_kernels
