// AdaGrad's update of many tensors and the reductions of the tests, in one pass.
//
//   g = s grad    d = (-g or g) + decay w    v <- v + d^2    w <- w - lr d / (sqrt(v) + eps)
//
// Cost model. Bytes an element: param, grad, sum read, param and sum written = 20 in float32
// (24 with coordinate sums), 14 (18) with bfloat16 parameters. Arithmetic: one root, one division
// (three with coordinates), about 50 (90) instructions an element where 4.3 TB/s leave an SM
// time for about 150 (180): the pass is bound by memory, and 90 % and more of the copy bandwidth
// is to be expected. The reductions add no traffic but 40 bytes a block.
//
// Geometry. 256 threads, 4 blocks on an SM (64 registers a thread): 1024 threads with three or
// four 16-byte loads each are 48 to 64 KB in flight on an SM; 4.3 TB/s over 132 SMs at a latency
// of 700 ns need 23 KB. A block takes 1024 to 16384 elements (optimizer_ops.cpp): few enough that
// 2 M parameters fill the machine, enough that its reduction at the end is hidden.
#include "multi_tensor.cuh"

namespace adagrad_kernels {

template <class P, class G, bool kCoordinates>
__global__ void __launch_bounds__(kThreads, kBlocksAnSM<P, kCoordinates>)
    adagrad_kernel(const __grid_constant__ TensorTable table,
                   const __grid_constant__ AdagradOptions o, const Partials partials) {
  using A = Compute<P>;
  constexpr int N = kPack<P>;
  const Chunk<P, G> chunk(table, blockIdx.x);
  const A lr = static_cast<A>(chunk.lr), decay = static_cast<A>(chunk.weight_decay);
  const A eps = static_cast<A>(o.eps), scale = static_cast<A>(o.grad_scale);
  const A sign = o.maximize ? -1 : 1;
  const VarianceFactors<A> factors = variance_factors<A>(o.grad_scale, o.samples);
  A norm = 0;
  CoordinateReductions<A> r = {};
  for (int i = threadIdx.x * N; i < chunk.count; i += kThreads * N) {
    const int count = chunk.count - i;
    A p[N], g[N], v[N], c[N];
    load(chunk.grad + i, count, chunk.aligned, A(0), g);
    load(chunk.param + i, count, chunk.aligned, A(0), p);
    load(chunk.sum + i, count, chunk.aligned, A(1), v);
    if constexpr (kCoordinates) {
      load(chunk.coordinate_sums + i, count, chunk.aligned, A(0), c);
    }
#pragma unroll
    for (int k = 0; k < N; ++k) {
      const A scaled = scale * g[k];
      const A denominator = adagrad_element(p[k], v[k], sign * scaled + decay * p[k], lr, eps);
      const A square = scaled * scaled;
      norm += square;
      if constexpr (kCoordinates) add_coordinate(square, c[k], denominator, factors, r);
    }
    store(chunk.param + i, count, chunk.aligned, p);
    store(chunk.sum + i, count, chunk.aligned, v);
  }
  store_partial(partials, kGradNorm, norm);
  if constexpr (kCoordinates) store_coordinates(partials, r);
}

cudaError_t launch_adagrad(const TensorTable& table, Type param, Type grad,
                           const AdagradOptions& options, bool coordinates, Partials partials,
                           cudaStream_t stream) {
  if (table.blocks == 0) return cudaSuccess;
  return with_types(param, grad, [&](auto p, auto g) {
    using P = decltype(p);
    using G = decltype(g);
    const auto kernel = coordinates ? adagrad_kernel<P, G, true> : adagrad_kernel<P, G, false>;
    kernel<<<table.blocks, kThreads, 0, stream>>>(table, options, partials);
    return cudaGetLastError();
  });
}

}  // namespace adagrad_kernels
