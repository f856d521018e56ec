// The CPU ops as the dispatcher calls them: schemas in adagrad_kernels/ops/, which also
// states formulas and shapes. Registered in binding.cpp.
#pragma once

#include <optional>
#include <tuple>
#include <vector>

#include "../common/tensors.h"

namespace adagrad_kernels {

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

Tensor grad_norm_sq_cpu(const std::vector<Tensor>& tensors);

// grad_weight, grad_bias, probe, weight_sums, bias_sums
using LayerGrads = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;
LayerGrads linear_weight_grad_cpu(const Tensor& grad_out, const Tensor& input, int64_t capacity,
                                  bool weight, bool bias, bool coordinates);
// grad_norm_sq, reductions, grad_bias, probe, weight_sums, bias_sums
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> linear_adagrad_cpu(
    const Tensor& grad_out, const Tensor& input, const Tensor& weight, const Tensor& sum,
    int64_t capacity, bool bias, bool coordinates, double lr, double eps, double weight_decay,
    bool maximize, double grad_scale);
LayerGrads conv_weight_grad_cpu(const Tensor& grad_out, const Tensor& input,
                                const std::vector<int64_t>& kernel_size,
                                const std::vector<int64_t>& stride,
                                const std::vector<int64_t>& padding,
                                const std::vector<int64_t>& dilation, int64_t groups,
                                int64_t capacity, bool weight, bool bias, bool coordinates);
std::tuple<Tensor, Tensor> conv_sample_grads_cpu(const Tensor& grad_out, const Tensor& input,
                                                 const std::vector<int64_t>& kernel_size,
                                                 const std::vector<int64_t>& stride,
                                                 const std::vector<int64_t>& padding,
                                                 const std::vector<int64_t>& dilation,
                                                 int64_t groups, bool weight, bool bias);
LayerGrads scale_weight_grad_cpu(const Tensor& grad_out, const Tensor& input,
                                 const std::optional<Tensor>& mean,
                                 const std::optional<Tensor>& rstd, int64_t capacity, bool weight,
                                 bool bias, bool coordinates);
// grad_input, grad_weight, grad_bias, probe, weight_sums, bias_sums, sample_grads
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> norm_backward_cpu(
    const Tensor& grad_out, const Tensor& input, const std::optional<Tensor>& mean,
    const Tensor& rstd, const Tensor& scale, int64_t capacity, bool weight, bool bias,
    bool coordinates, bool samples);
std::tuple<Tensor, Tensor, Tensor> embedding_weight_grad_cpu(const Tensor& grad_out,
                                                             const Tensor& indices,
                                                             int64_t num_embeddings,
                                                             int64_t padding_idx, int64_t capacity,
                                                             bool coordinates);

}  // namespace adagrad_kernels
