// The launchers of the CUDA kernels: device pointers in, nothing allocated, nothing waited for.
// The .cu files include no torch header; the *_ops.cpp files check, allocate and call these.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../common/adagrad.h"

namespace adagrad_kernels {

enum class Type : int { f32, f64, bf16, f16 };

// multi_tensor.cuh: many tensors in one launch.
struct TensorItem {
  void* param;  // unused pointers may be null
  const void* grad;
  void* sum;
  const void* coordinate_sums;
  int64_t numel;
  double lr, weight_decay;
  int32_t first_block;  // blocks of the items before this one
  int32_t aligned;      // whether every pointer is a multiple of 16 bytes
};
#if CUDART_VERSION >= 12010
constexpr int kMaxItems = 160;  // 10 KB of the 32 KB of parameters that a kernel may have
#else
constexpr int kMaxItems = 60;  // 4 KB in older toolkits
#endif
// Passed by value: it lies in the kernel's parameters, so that there is no copy to the device
// and a captured graph keeps it.
struct TensorTable {
  TensorItem items[kMaxItems];
  int32_t count;
  int32_t blocks;
  int64_t chunk;  // elements a block
};

// adagrad.cu, adagrad_norm.cu: each block writes partial sums to partials[row * stride + block].
// Params and grads of the given types; sums and coordinate_sums float, or double with double.
enum AdagradRow { kGradNorm, kVariance, kRatio, kVarianceMetric, kGradMetric, kDecayedNorm, kRows };
struct Partials {
  double* data;
  int64_t stride;
};
cudaError_t launch_adagrad(const TensorTable& table, Type param, Type grad,
                           const AdagradOptions& options, bool coordinates, Partials partials,
                           cudaStream_t stream);
// Rows kGradNorm and, where decayed, kDecayedNorm; params are read only then.
cudaError_t launch_adagrad_norm_reduce(const TensorTable& table, Type param, Type grad,
                                       const AdagradOptions& options, bool decayed,
                                       Partials partials, cudaStream_t stream);
// The step with the common denominator sqrt(*accumulator) + eps; the rows of coordinates.
cudaError_t launch_adagrad_norm_update(const TensorTable& table, Type param, Type grad,
                                       const AdagradOptions& options, bool coordinates,
                                       const double* accumulator, Partials partials,
                                       cudaStream_t stream);

// reduce.cu: sums (or maxima) of rows of partials, one block a job, in a fixed order.
struct ReduceJob {
  const double* partials;
  int64_t count;
  double* out;
  bool max;
  bool add;  // to what out holds
};
struct ReduceJobs {
  ReduceJob jobs[kRows];
  int count;
};
cudaError_t launch_reduce(const ReduceJobs& jobs, cudaStream_t stream);

// sample_statistics.cu: g [rows, columns], contiguous. The split decides the workspaces:
// norm_partials [rows, column_blocks], sum_partials [2, row_blocks, columns] (unused for one).
struct SampleSplit {
  int64_t column_blocks, row_blocks, rows_a_block;
};
SampleSplit split_samples(Type type, int64_t rows, int64_t columns);
cudaError_t launch_sample_statistics(Type type, const void* g, int64_t rows, int64_t columns,
                                     const SampleSplit& split, void* norm_partials,
                                     void* sum_partials, void* sum, void* sum_sq, void* norms_sq,
                                     cudaStream_t stream);

}  // namespace adagrad_kernels
