// The CPU ops as the dispatcher calls them: schemas in adagrad_kernels/ops.py, which also
// states formulas and shapes. Registered in binding.cpp.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <tuple>
#include <vector>

namespace adagrad_kernels {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

std::tuple<Tensor, Tensor, Tensor> sample_statistics_cpu(const Tensor& g);
std::tuple<Tensor, Tensor> pool_samples_cpu(const std::vector<Tensor>& probes,
                                            const std::vector<int64_t>& rows);

std::tuple<Tensor, Tensor> adagrad_cpu(const std::vector<Tensor>& params,
                                       const std::vector<Tensor>& grads,
                                       const std::vector<Tensor>& sums,
                                       const std::vector<Tensor>& coordinate_sums, double lr,
                                       double eps, double weight_decay, bool maximize,
                                       double grad_scale, int64_t samples);
std::tuple<Tensor, Tensor> adagrad_norm_cpu(const std::vector<Tensor>& params,
                                            const std::vector<Tensor>& grads, const Tensor& sum,
                                            const std::vector<Tensor>& coordinate_sums,
                                            const std::vector<double>& lr, double eps,
                                            const std::vector<double>& weight_decay, bool maximize,
                                            double grad_scale, int64_t samples);

// grad_weight, grad_bias, probe, weight_sums, bias_sums
using LayerGrads = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;
LayerGrads linear_weight_grad_cpu(const Tensor& grad_out, const Tensor& input, int64_t capacity,
                                  bool weight, bool bias, bool coordinates);
LayerGrads conv2d_weight_grad_cpu(const Tensor& grad_out, const Tensor& input,
                                  const std::vector<int64_t>& kernel_size,
                                  const std::vector<int64_t>& stride,
                                  const std::vector<int64_t>& padding,
                                  const std::vector<int64_t>& dilation, int64_t groups,
                                  int64_t capacity, bool weight, bool bias, bool coordinates);

// Helpers shared by the ops.
inline bool is_double(const Tensor& t) { return t.scalar_type() == ScalarType::Double; }

// float32 or float64 as it is, bfloat16 and float16 as a float32 copy.
inline Tensor as_compute(const Tensor& t) {
  const ScalarType type = t.scalar_type();
  if (type == ScalarType::Float || type == ScalarType::Double) return t;
  STD_TORCH_CHECK(type == ScalarType::BFloat16 || type == ScalarType::Half,
                  "adagrad_kernels: expected a floating point tensor");
  return torch::stable::to(t, ScalarType::Float);
}

template <class T>
T* data(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}
template <class T>
const T* const_data(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace adagrad_kernels
