// AdaGrad-Norm: one accumulator for all parameters, so the step needs the norm of everything.
//
//   1. reduce: partial sums of |g|^2 and |d|^2       (d as in adagrad.cu)
//   2. launch_reduce (reduce.cu): v <- v + |d|^2, on the device
//   3. update: w <- w - lr / (sqrt(v) + eps) d, v read by every thread
//
// The host waits for nothing. Also grad_norm_sq: step 1 alone.
//
// Cost model. Bytes an element in float32: 4 in the reduction (8 with weight decay), param and
// grad read and param written = 12 in the update (16 with coordinate sums), so 16 together; what
// of the gradients still lies in L2 (50 MB) after the reduction is read at a higher rate. Two to
// ten instructions an element: both passes run at the copy bandwidth. Geometry as in adagrad.cu.
#include "multi_tensor.cuh"

namespace adagrad_kernels {

template <class P, class G, bool kDecayed>
__global__ void __launch_bounds__(kThreads, kBlocksAnSM<P>)
    adagrad_norm_reduce_kernel(const __grid_constant__ TensorTable table,
                               const __grid_constant__ AdagradOptions o, const Partials partials) {
  using A = Compute<P>;
  constexpr int N = kPack<P>;
  const Chunk<P, G> chunk(table, blockIdx.x);
  const A decay = static_cast<A>(chunk.weight_decay), scale = static_cast<A>(o.grad_scale);
  const A sign = o.maximize ? -1 : 1;
  A norm = 0, decayed_norm = 0;
#pragma unroll 2
  for (int i = threadIdx.x * N; i < chunk.count; i += kThreads * N) {
    const int count = chunk.count - i;
    A g[N], p[N];
    load(chunk.grad + i, count, chunk.aligned, A(0), g);
    if constexpr (kDecayed) load(chunk.param + i, count, chunk.aligned, A(0), p);
#pragma unroll
    for (int k = 0; k < N; ++k) {
      const A scaled = scale * g[k];
      norm += scaled * scaled;
      if constexpr (kDecayed) {
        const A d = sign * scaled + decay * p[k];
        decayed_norm += d * d;
      }
    }
  }
  store_partial(partials, kGradNorm, norm);
  if constexpr (kDecayed) store_partial(partials, kDecayedNorm, decayed_norm);
}

template <class P, class G, bool kCoordinates>
__global__ void __launch_bounds__(kThreads, kBlocksAnSM<P, kCoordinates>)
    adagrad_norm_update_kernel(const __grid_constant__ TensorTable table,
                               const __grid_constant__ AdagradOptions o, const double* accumulator,
                               const Partials partials) {
  using A = Compute<P>;
  constexpr int N = kPack<P>;
  const Chunk<P, G> chunk(table, blockIdx.x);
  const double root = sqrt(*accumulator) + o.eps;
  const A step = static_cast<A>(chunk.lr / root), denominator = static_cast<A>(root);
  const A decay = static_cast<A>(chunk.weight_decay), scale = static_cast<A>(o.grad_scale);
  const A sign = o.maximize ? -1 : 1;
  const VarianceFactors<A> factors = variance_factors<A>(o.grad_scale, o.samples);
  CoordinateReductions<A> r = {};
  for (int i = threadIdx.x * N; i < chunk.count; i += kThreads * N) {
    const int count = chunk.count - i;
    A p[N], g[N], c[N];
    load(chunk.grad + i, count, chunk.aligned, A(0), g);
    load(chunk.param + i, count, chunk.aligned, A(0), p);
    if constexpr (kCoordinates) {
      load(chunk.coordinate_sums + i, count, chunk.aligned, A(0), c);
    }
#pragma unroll
    for (int k = 0; k < N; ++k) {
      const A scaled = scale * g[k];
      p[k] -= step * (sign * scaled + decay * p[k]);
      if constexpr (kCoordinates) {
        add_coordinate(scaled * scaled, c[k], denominator, factors, r);
      }
    }
    store(chunk.param + i, count, chunk.aligned, p);
  }
  if constexpr (kCoordinates) store_coordinates(partials, r);
}

cudaError_t launch_adagrad_norm_reduce(const TensorTable& table, Type param, Type grad,
                                       const AdagradOptions& options, bool decayed,
                                       Partials partials, cudaStream_t stream) {
  if (table.blocks == 0) return cudaSuccess;
  return with_types(param, grad, [&](auto p, auto g) {
    using P = decltype(p);
    using G = decltype(g);
    const auto kernel =
        decayed ? adagrad_norm_reduce_kernel<P, G, true> : adagrad_norm_reduce_kernel<P, G, false>;
    kernel<<<table.blocks, kThreads, 0, stream>>>(table, options, partials);
    return cudaGetLastError();
  });
}

cudaError_t launch_adagrad_norm_update(const TensorTable& table, Type param, Type grad,
                                       const AdagradOptions& options, bool coordinates,
                                       const double* accumulator, Partials partials,
                                       cudaStream_t stream) {
  if (table.blocks == 0) return cudaSuccess;
  return with_types(param, grad, [&](auto p, auto g) {
    using P = decltype(p);
    using G = decltype(g);
    const auto kernel = coordinates ? adagrad_norm_update_kernel<P, G, true>
                                    : adagrad_norm_update_kernel<P, G, false>;
    kernel<<<table.blocks, kThreads, 0, stream>>>(table, options, accumulator, partials);
    return cudaGetLastError();
  });
}

}  // namespace adagrad_kernels
