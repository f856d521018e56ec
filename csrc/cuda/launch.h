// What every op needs before it launches: the device, its current stream, and error messages.
#pragma once

#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>

#include "../common/tensors.h"
#include "kernels.h"

namespace adagrad_kernels {

// torch's current stream on a device.
cudaStream_t current_stream(int32_t device);

// Makes the tensor's device the current one for as long as this lives.
struct Launch {
  explicit Launch(const Tensor& on)
      : device(on.get_device_index()), guard(device), stream(current_stream(device)) {}

  const int32_t device;
  const torch::stable::accelerator::DeviceGuard guard;
  const cudaStream_t stream;
};

inline void check(cudaError_t error, const char* op) {
  STD_TORCH_CHECK(error == cudaSuccess, op, ": ", cudaGetErrorString(error));
}

inline Type type_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return Type::f32;
    case ScalarType::Double:
      return Type::f64;
    case ScalarType::BFloat16:
      return Type::bf16;
    case ScalarType::Half:
      return Type::f16;
    default:
      STD_TORCH_CHECK(false, "adagrad_kernels: expected a floating point tensor");
  }
}

}  // namespace adagrad_kernels
