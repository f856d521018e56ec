// Runs CUDA kernels on the CPU, so that their code is tested where there is no GPU: blocks one
// after another, a block's threads as fibers that give way at barriers and shuffles. It says
// nothing about speed, memory order or the hardware's limits. Included before each .cu file.
#pragma once

#include <cuda_runtime_api.h>

#include <cmath>
#include <functional>

#undef __shared__
#define __shared__ static  // blocks run one after another, so one copy serves them all
#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __grid_constant__
#define __grid_constant__

namespace emulation {

struct Launch {
  dim3 grid;
  int threads;
  size_t shared_bytes;
  cudaStream_t stream;
};
void run(const Launch& launch, const std::function<void()>& kernel);
void block_barrier();
// The value that another lane of the warp holds.
double from_lane(double value, int lane);

}  // namespace emulation

extern uint3 threadIdx, blockIdx;
extern dim3 gridDim;

inline void __syncthreads() { emulation::block_barrier(); }
template <class T>
T __shfl_down_sync(unsigned, T value, int offset) {
  const int lane = threadIdx.x % 32 + offset;
  return static_cast<T>(emulation::from_lane(value, lane < 32 ? lane : threadIdx.x % 32));
}
template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return static_cast<T>(emulation::from_lane(value, (threadIdx.x % 32) ^ mask));
}
