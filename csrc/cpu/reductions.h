// The reductions of AdaGrad's updates: how parts are joined and what the ops return.
#pragma once

#include <cmath>

#include "../common/adagrad.h"
#include "ops.h"

namespace adagrad_kernels {

inline void add(AdagradReductions& total, const AdagradReductions& part) {
  total.grad_norm_sq += part.grad_norm_sq;
  total.variance_sum += part.variance_sum;
  total.max_ratio = std::fmax(total.max_ratio, part.max_ratio);
  total.variance_metric += part.variance_metric;
  total.grad_metric += part.grad_metric;
  total.decayed_norm_sq += part.decayed_norm_sq;
}

// (‖g‖², the four numbers of the coordinate tests or none)
inline std::tuple<Tensor, Tensor> as_tensors(const Tensor& like, const AdagradReductions& r,
                                             bool coordinates) {
  Tensor grad_norm_sq = torch::stable::new_empty(like, {}, ScalarType::Double);
  *data<double>(grad_norm_sq) = r.grad_norm_sq;
  Tensor reductions = torch::stable::new_empty(like, {coordinates ? 4 : 0}, ScalarType::Double);
  if (coordinates) {
    double* out = data<double>(reductions);
    out[0] = r.variance_sum;
    out[1] = r.max_ratio;
    out[2] = r.variance_metric;
    out[3] = r.grad_metric;
  }
  return {grad_norm_sq, reductions};
}

}  // namespace adagrad_kernels
