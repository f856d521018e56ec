// What the CPU and the CUDA kernels of AdaGrad have in common: their options and results.
#pragma once

#include <cstdint>

namespace adagrad_kernels {

struct AdagradOptions {
  double lr, eps, weight_decay, grad_scale;
  bool maximize;
  double samples;  // N of the coordinate test; read only where coordinate_sums is given
};
struct AdagradReductions {
  double grad_norm_sq = 0;     // sum of g^2, without weight decay
  double variance_sum = 0;     // sum of var_j
  double max_ratio = 0;        // max of var_j / g_j^2, 0/0 taken as 0
  double variance_metric = 0;  // sum of var_j / (sqrt(v_j) + eps)
  double grad_metric = 0;      // sum of g_j^2 / (sqrt(v_j) + eps)
  double decayed_norm_sq = 0;  // sum of (g + weight_decay p)^2
};

}  // namespace adagrad_kernels
