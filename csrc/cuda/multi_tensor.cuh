// Many tensors in one launch. Each block handles `chunk` elements of one tensor; it finds the
// tensor by bisecting `first_block` in the table, which lies in the kernel's parameters: constant
// memory, read by all threads alike, at most 8 steps.
#pragma once

#include "device.cuh"
#include "kernels.h"

#define ADAGRAD_KERNELS_INLINE __host__ __device__ __forceinline__

namespace adagrad_kernels {

#include "../common/adagrad_math.inl"

__device__ __forceinline__ const TensorItem& item_of_block(const TensorTable& table, int block) {
  int low = 0, high = table.count;  // items[low].first_block <= block < items[high].first_block
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (table.items[middle].first_block <= block ? low : high) = middle;
  }
  return table.items[low];
}

// One block's part of one tensor. P and G are the types of parameter and gradient.
template <class P, class G>
struct Chunk {
  using A = Compute<P>;
  P* param;
  const G* grad;
  A* sum;
  const A* coordinate_sums;
  int count;
  bool aligned;
  double lr, weight_decay;

  __device__ __forceinline__ Chunk(const TensorTable& table, int block) {
    const TensorItem& item = item_of_block(table, block);
    const int64_t first = (block - item.first_block) * table.chunk;
    const int64_t left = item.numel - first;
    param = static_cast<P*>(item.param) + first;
    grad = static_cast<const G*>(item.grad) + first;
    sum = static_cast<A*>(item.sum) + first;
    coordinate_sums = static_cast<const A*>(item.coordinate_sums) + first;
    count = static_cast<int>(left < table.chunk ? left : table.chunk);
    aligned = item.aligned;
    lr = item.lr;
    weight_decay = item.weight_decay;
  }
};

// One of a block's results to its column of the partials.
__device__ __forceinline__ void store_partial(Partials partials, AdagradRow row, double value) {
  const double total = block_reduce<kThreads>(value, row == kRatio);
  if (threadIdx.x == 0) partials.data[row * partials.stride + blockIdx.x] = total;
}

template <class A>
__device__ __forceinline__ void store_coordinates(Partials partials,
                                                  const CoordinateReductions<A>& r) {
  store_partial(partials, kVariance, r.variance);
  store_partial(partials, kRatio, r.ratio);
  store_partial(partials, kVarianceMetric, r.variance_metric);
  store_partial(partials, kGradMetric, r.grad_metric);
}

// Blocks that must fit on an SM at the same time: 4 leave a thread 64 registers, 3 leave 80, 2
// leave 128. Double needs more than float, and so do the 8 elements at a time of low precision.
template <class P, bool kCoordinates = false>
constexpr int kBlocksAnSM = (sizeof(P) == 8 ? 3 : 4) - (kCoordinates && sizeof(P) != 4 ? 1 : 0);

// Calls body(P(), G()) with the C++ types of a parameter and its gradient: equal, or a float
// gradient of a low-precision parameter.
template <class Body>
cudaError_t with_types(Type param, Type grad, const Body& body) {
  const bool wide = grad != param;
  if (wide && (grad != Type::f32 || param == Type::f64)) return cudaErrorInvalidValue;
  switch (param) {
    case Type::f32:
      return body(float(), float());
    case Type::f64:
      return body(double(), double());
    case Type::bf16:
      return wide ? body(__nv_bfloat16(), float()) : body(__nv_bfloat16(), __nv_bfloat16());
    case Type::f16:
      return wide ? body(__half(), float()) : body(__half(), __half());
  }
  return cudaErrorInvalidValue;
}

}  // namespace adagrad_kernels
