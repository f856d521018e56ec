// Registers the compiled kernels under the names that adagrad_kernels/ops/ declares.
// Stable ABI only: one build runs under every torch from 2.11 on.
#include <torch/csrc/stable/library.h>

#include "cpu/isa.h"
#include "cpu/kernels.h"
#include "cpu/ops.h"

STABLE_TORCH_LIBRARY_IMPL(adagrad_kernels, CPU, m) {
  m.impl("sample_statistics", TORCH_BOX(&adagrad_kernels::sample_statistics_cpu));
  m.impl("pool_samples", TORCH_BOX(&adagrad_kernels::pool_samples_cpu));
  m.impl("adagrad_", TORCH_BOX(&adagrad_kernels::adagrad_cpu));
  m.impl("adagrad_norm_", TORCH_BOX(&adagrad_kernels::adagrad_norm_cpu));
  m.impl("grad_norm_sq", TORCH_BOX(&adagrad_kernels::grad_norm_sq_cpu));
  m.impl("linear_weight_grad", TORCH_BOX(&adagrad_kernels::linear_weight_grad_cpu));
  m.impl("linear_adagrad_", TORCH_BOX(&adagrad_kernels::linear_adagrad_cpu));
  m.impl("conv_weight_grad", TORCH_BOX(&adagrad_kernels::conv_weight_grad_cpu));
  m.impl("conv_sample_grads", TORCH_BOX(&adagrad_kernels::conv_sample_grads_cpu));
  m.impl("embedding_weight_grad", TORCH_BOX(&adagrad_kernels::embedding_weight_grad_cpu));
  m.impl("scale_weight_grad", TORCH_BOX(&adagrad_kernels::scale_weight_grad_cpu));
  m.impl("norm_backward", TORCH_BOX(&adagrad_kernels::norm_backward_cpu));
}

// For show_config(): the instruction set in use.
extern "C" __attribute__((visibility("default"))) const char* adagrad_kernels_isa() {
  return adagrad_kernels::isa_name(adagrad_kernels::isa());
}

// For coverage(): the choice that linear_weight_grad and conv_weight_grad make from their shapes.
extern "C" __attribute__((visibility("default"))) int adagrad_kernels_method(int64_t nu, int64_t nv,
                                                                             int64_t positions,
                                                                             bool coordinates,
                                                                             bool linear) {
  return static_cast<int>(adagrad_kernels::method_of(nu, nv, positions, coordinates, linear));
}
