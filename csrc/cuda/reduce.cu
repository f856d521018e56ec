// The second half of every reduction: partial results, one a block of the first kernel, to one
// number. Block partials and a kernel that adds them in a fixed order, instead of atomics, whose
// order changes from run to run: the same bits every time.
//
// Cost: 8 bytes a partial, 2 KB to 120 KB a job for 1 M to 250 M parameters, through one SM: a few
// microseconds, most of them the launch.
#include "device.cuh"
#include "kernels.h"

namespace adagrad_kernels {

constexpr int kReduceThreads = 512;

__global__ void __launch_bounds__(kReduceThreads)
    reduce_kernel(const __grid_constant__ ReduceJobs jobs) {
  const ReduceJob& job = jobs.jobs[blockIdx.x];
  double value = 0;
#pragma unroll 4
  for (int64_t i = threadIdx.x; i < job.count; i += kReduceThreads) {
    value = combine(value, job.partials[i], job.max);
  }
  value = block_reduce<kReduceThreads>(value, job.max);
  if (threadIdx.x == 0) *job.out = job.add ? *job.out + value : value;
}

cudaError_t launch_reduce(const ReduceJobs& jobs, cudaStream_t stream) {
  if (jobs.count == 0) return cudaSuccess;
  reduce_kernel<<<jobs.count, kReduceThreads, 0, stream>>>(jobs);
  return cudaGetLastError();
}

}  // namespace adagrad_kernels
