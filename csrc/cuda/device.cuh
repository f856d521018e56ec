// What every kernel needs: 16-byte accesses with conversion, and sums over a block in a fixed
// order.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace adagrad_kernels {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;

// The type to compute in.
template <class T>
struct ComputeOf {
  using type = float;
};
template <>
struct ComputeOf<double> {
  using type = double;
};
template <class T>
using Compute = typename ComputeOf<T>::type;

// Elements of T in 16 bytes: what one thread handles at a time.
template <class T>
constexpr int kPack = 16 / static_cast<int>(sizeof(T));

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }

__device__ __forceinline__ void narrow(float x, float& out) { out = x; }
__device__ __forceinline__ void narrow(double x, double& out) { out = x; }
__device__ __forceinline__ void narrow(float x, __half& out) { out = __float2half_rn(x); }
__device__ __forceinline__ void narrow(float x, __nv_bfloat16& out) {
  out = __float2bfloat16_rn(x);
}

// N consecutive elements, moved in pieces of up to 16 bytes.
template <class T, int N>
struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Pack {
  T element[N];
};

// The N elements from p on, `count` of which exist; the others read as `fill`.
template <int N, class T, class A>
__device__ __forceinline__ void load(const T* p, int count, bool aligned, A fill, A (&out)[N]) {
  if (aligned && count >= N) {
    const Pack<T, N> pack = *reinterpret_cast<const Pack<T, N>*>(p);
#pragma unroll
    for (int k = 0; k < N; ++k) out[k] = widen(pack.element[k]);
  } else {
#pragma unroll
    for (int k = 0; k < N; ++k) out[k] = k < count ? widen(p[k]) : fill;
  }
}

template <int N, class T, class A>
__device__ __forceinline__ void store(T* p, int count, bool aligned, const A (&in)[N]) {
  if (aligned && count >= N) {
    Pack<T, N> pack;
#pragma unroll
    for (int k = 0; k < N; ++k) narrow(in[k], pack.element[k]);
    *reinterpret_cast<Pack<T, N>*>(p) = pack;
  } else {
#pragma unroll
    for (int k = 0; k < N; ++k) {
      if (k < count) narrow(in[k], p[k]);
    }
  }
}

__device__ __forceinline__ double combine(double a, double b, bool max) {
  return max ? (b > a ? b : a) : a + b;
}

// The sum (or maximum) of one value a thread over the block, in thread 0. Every thread of a block
// of kBlockThreads must call it. A tree of fixed shape: the same result at every run.
template <int kBlockThreads>
__device__ __forceinline__ double block_reduce(double value, bool max) {
  static_assert(kBlockThreads % 32 == 0 && kBlockThreads <= 1024, "whole warps, at most 32");
  constexpr int kBlockWarps = kBlockThreads / 32;
  __shared__ double parts[kBlockWarps];
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    value = combine(value, __shfl_down_sync(0xffffffffu, value, offset), max);
  }
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  __syncthreads();  // the parts of a call before this one have been read
  if (lane == 0) parts[warp] = value;
  __syncthreads();
  if (warp == 0) {
    value = lane < kBlockWarps ? parts[lane] : 0.0;  // 0 is neutral: maxima are of ratios >= 0
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) {
      value = combine(value, __shfl_down_sync(0xffffffffu, value, offset), max);
    }
  }
  return value;
}

}  // namespace adagrad_kernels
