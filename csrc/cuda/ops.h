// The CUDA ops as the dispatcher calls them: schemas in adagrad_kernels/ops/, which also
// states formulas and shapes. Registered in binding.cpp. None waits for the device and all memory
// comes from torch's allocator, so each can be captured in a graph.
#pragma once

#include <tuple>
#include <vector>

#include "../common/tensors.h"

namespace adagrad_kernels {

std::tuple<Tensor, Tensor, Tensor> sample_statistics_cuda(const Tensor& g);
std::tuple<Tensor, Tensor> adagrad_cuda(const std::vector<Tensor>& params,
                                        const std::vector<Tensor>& grads,
                                        const std::vector<Tensor>& sums,
                                        const std::vector<Tensor>& coordinate_sums, double lr,
                                        double eps, double weight_decay, bool maximize,
                                        double grad_scale, int64_t samples);
std::tuple<Tensor, Tensor> adagrad_norm_cuda(const std::vector<Tensor>& params,
                                             const std::vector<Tensor>& grads, const Tensor& sum,
                                             const std::vector<Tensor>& coordinate_sums,
                                             const std::vector<double>& lr, double eps,
                                             const std::vector<double>& weight_decay, bool maximize,
                                             double grad_scale, int64_t samples);
Tensor grad_norm_sq_cuda(const std::vector<Tensor>& tensors);

}  // namespace adagrad_kernels
