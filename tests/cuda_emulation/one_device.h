// Included before each op's source: CPU tensors count as CUDA tensors, all of one device.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

namespace torch::stable::accelerator {
struct EmulatedGuard {
  explicit EmulatedGuard(int) {}
};
}  // namespace torch::stable::accelerator

#define DeviceGuard EmulatedGuard
#define is_cuda is_cpu
