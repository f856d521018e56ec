// The outputs of scale and shift by channel, which scale_op.cpp and norm_backward_op.cpp share.
#pragma once

#include "layer_ops.h"

namespace adagrad_kernels {

// Gradients and sums of squares of weight and bias, [C] each or [0]; while kernels run, parts of
// one buffer [4 C].
struct ScaleOutputs {
  Tensor grad[2], sums[2];  // weight, bias

  ScaleOutputs(const Tensor& like, int64_t channels, bool weight, bool bias, bool coordinates) {
    const bool wanted[2] = {weight, bias};
    for (int k = 0; k < 2; ++k) {
      grad[k] = allocate(like, {wanted[k] ? channels : 0});
      sums[k] = allocate(like, {wanted[k] && coordinates ? channels : 0});
    }
  }

  template <class T>
  ScaleSums<T> in(T* buffer, int64_t channels) const {
    const auto part = [&](const Tensor& t, int64_t k) {
      return t.numel() ? buffer + k * channels : nullptr;
    };
    return {part(grad[0], 0), part(grad[1], 1), part(sums[0], 2), part(sums[1], 3)};
  }

  template <class T>
  void copy_from(T* buffer, int64_t channels) const {
    const ScaleSums<T> from = in(buffer, channels);
    const T* parts[4] = {from.weight, from.bias, from.weight_sq, from.bias_sq};
    const Tensor* outputs[4] = {&grad[0], &grad[1], &sums[0], &sums[1]};
    for (int k = 0; k < 4; ++k) {
      if (parts[k]) std::copy(parts[k], parts[k] + channels, data<T>(*outputs[k]));
    }
  }
};

}  // namespace adagrad_kernels
