// Registers the CUDA kernels under the names that adagrad_kernels/ops/ declares. Compiled only
// where setup.py finds nvcc.
#include <torch/csrc/stable/library.h>

#include "ops.h"

STABLE_TORCH_LIBRARY_IMPL(adagrad_kernels, CUDA, m) {
  m.impl("sample_statistics", TORCH_BOX(&adagrad_kernels::sample_statistics_cuda));
  m.impl("adagrad_", TORCH_BOX(&adagrad_kernels::adagrad_cuda));
  m.impl("adagrad_norm_", TORCH_BOX(&adagrad_kernels::adagrad_norm_cuda));
  m.impl("grad_norm_sq", TORCH_BOX(&adagrad_kernels::grad_norm_sq_cuda));
}
