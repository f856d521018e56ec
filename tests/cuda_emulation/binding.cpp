// The emulated ops, under names of their own.
#include "launch.h"
#include "ops.h"

namespace adagrad_kernels {
cudaStream_t current_stream(int32_t) { return nullptr; }
}  // namespace adagrad_kernels

STABLE_TORCH_LIBRARY_IMPL(adagrad_kernels_emulated, CPU, m) {
  m.impl("sample_statistics", TORCH_BOX(&adagrad_kernels::sample_statistics_cuda));
  m.impl("adagrad_", TORCH_BOX(&adagrad_kernels::adagrad_cuda));
  m.impl("adagrad_norm_", TORCH_BOX(&adagrad_kernels::adagrad_norm_cuda));
  m.impl("grad_norm_sq", TORCH_BOX(&adagrad_kernels::grad_norm_sq_cuda));
}
