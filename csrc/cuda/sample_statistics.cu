// Column sums, column sums of squares and squared row norms of g [rows, columns], in one read.
//
//   sum[j] = sum_i g_ij    sum_sq[j] = sum_i g_ij^2    norms_sq[i] = sum_j g_ij^2
//
// Cost model. sizeof(T) * rows * columns bytes read, everything else is small: 8 bytes a column,
// one norm a row and block. At 4.3 TB/s an SM receives 16 bytes, a thread's part of a row, in about
// one cycle; they take some 20 instructions, of which an SM executes 128 in a cycle: the read
// decides, and 90 % and more of the copy bandwidth is to be expected.
//
// Geometry. A block takes 256 threads * 16 bytes of columns, each thread its own, and walks down
// the rows, 8 at a time, so that 128 bytes a thread are in flight and column sums stay in
// registers. The 8 row norms of a warp are summed together in 9 shuffles. Where there are fewer
// than 512 such column blocks the rows are divided as well, at least 64 to a block: column sums of
// the parts then go through memory (at most 4 / 64 of the traffic) and are added in order.
// Rows that do not start on 16 bytes are read one element a thread, neighbours together.
#include "device.cuh"
#include "kernels.h"

namespace adagrad_kernels {

namespace {

constexpr int kRowsAtOnce = 8;
constexpr int64_t kBlocksWanted = 512, kRowsABlock = 64;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace

// The sums of 8 values over a warp: lane 4 r of the result holds that of value r. At each step a
// lane keeps half of the values and sends the other half to the lane that keeps those.
template <class A>
__device__ __forceinline__ A warp_sums(A (&value)[kRowsAtOnce]) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int half = 4, offset = 16; half > 0; half /= 2, offset /= 2) {
#pragma unroll
    for (int j = 0; j < half; ++j) {
      const bool upper = lane & offset;
      const A keep = upper ? value[j + half] : value[j], send = upper ? value[j] : value[j + half];
      value[j] = keep + __shfl_xor_sync(0xffffffffu, send, offset);
    }
  }
  A sum = value[0];
  sum += __shfl_xor_sync(0xffffffffu, sum, 2);
  return sum + __shfl_xor_sync(0xffffffffu, sum, 1);
}

// kAligned: every row starts on 16 bytes, so a thread's N columns are neighbours; otherwise they
// are kThreads apart.
template <class T, bool kAligned>
__global__ void __launch_bounds__(kThreads, 2)
    sample_statistics_kernel(const T* __restrict__ g, int64_t rows, int64_t columns,
                             int64_t rows_a_block, Compute<T>* __restrict__ norm_partials,
                             Compute<T>* __restrict__ sum, Compute<T>* __restrict__ sum_sq) {
  using A = Compute<T>;
  constexpr int N = kPack<T>;
  constexpr int kStep = kAligned ? 1 : kThreads;
  __shared__ A parts[2][kWarps][kRowsAtOnce];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t first_column =
      blockIdx.x * int64_t{kThreads * N} + threadIdx.x * (kAligned ? N : 1);
  const int64_t first_row = blockIdx.y * rows_a_block;
  const int64_t last_row = first_row + rows_a_block < rows ? first_row + rows_a_block : rows;
  A total[N] = {}, total_sq[N] = {};
  int buffer = 0;
  for (int64_t row = first_row; row < last_row; row += kRowsAtOnce) {
    Pack<T, N> pack[kRowsAtOnce];
#pragma unroll
    for (int r = 0; r < kRowsAtOnce; ++r) {
      const T* p = g + (row + r) * columns + first_column;
      const bool exists = row + r < last_row;
      pack[r] = Pack<T, N>{};
      if constexpr (kAligned) {
        if (exists && first_column < columns) pack[r] = *reinterpret_cast<const Pack<T, N>*>(p);
      } else {
#pragma unroll
        for (int k = 0; k < N; ++k) {
          if (exists && first_column + k * kStep < columns) pack[r].element[k] = p[k * kStep];
        }
      }
    }
    A norm[kRowsAtOnce] = {}, part[N] = {}, part_sq[N] = {};
#pragma unroll
    for (int r = 0; r < kRowsAtOnce; ++r) {
#pragma unroll
      for (int k = 0; k < N; ++k) {
        const A x = widen(pack[r].element[k]);
        part[k] += x;
        part_sq[k] = fma(x, x, part_sq[k]);  // two instructions instead of three
        norm[r] = fma(x, x, norm[r]);
      }
    }
#pragma unroll
    for (int k = 0; k < N; ++k) {
      total[k] += part[k];
      total_sq[k] += part_sq[k];
    }
    const A norm_of_warp = warp_sums(norm);
    if (lane % 4 == 0) parts[buffer][warp][lane / 4] = norm_of_warp;
    __syncthreads();  // two buffers: the next round does not overwrite what is read below
    if (threadIdx.x < kRowsAtOnce && row + threadIdx.x < last_row) {
      A norm_of_block = 0;
      for (int w = 0; w < kWarps; ++w) norm_of_block += parts[buffer][w][threadIdx.x];
      norm_partials[(row + threadIdx.x) * gridDim.x + blockIdx.x] = norm_of_block;
    }
    buffer ^= 1;
  }
#pragma unroll
  for (int k = 0; k < N; ++k) {
    const int64_t column = first_column + k * kStep;
    if (column >= columns) continue;
    sum[blockIdx.y * columns + column] = total[k];
    sum_sq[blockIdx.y * columns + column] = total_sq[k];
  }
}

// One block a row: the norms of its column blocks, added in a fixed order.
template <class A>
__global__ void __launch_bounds__(kThreads)
    row_norms_kernel(const A* partials, int64_t column_blocks, A* norms_sq) {
  const A* p = partials + blockIdx.x * column_blocks;
  double value = 0;
#pragma unroll 4
  for (int64_t i = threadIdx.x; i < column_blocks; i += kThreads) value += p[i];
  value = block_reduce<kThreads>(value, false);
  if (threadIdx.x == 0) norms_sq[blockIdx.x] = static_cast<A>(value);
}

// One thread a column: the sums of its row blocks, added in order.
template <class A>
__global__ void __launch_bounds__(kThreads)
    column_sums_kernel(const A* partials, int64_t row_blocks, int64_t columns, A* sum, A* sum_sq) {
  const int64_t column = blockIdx.x * int64_t{kThreads} + threadIdx.x;
  if (column >= columns) return;
  A total = 0, total_sq = 0;
#pragma unroll 4
  for (int64_t r = 0; r < row_blocks; ++r) {
    total += partials[r * columns + column];
    total_sq += partials[(row_blocks + r) * columns + column];
  }
  sum[column] = total;
  sum_sq[column] = total_sq;
}

SampleSplit split_samples(Type type, int64_t rows, int64_t columns) {
  const int64_t pack = type == Type::f64 ? 2 : type == Type::f32 ? 4 : 8;
  const int64_t column_blocks = ceil_div(columns, kThreads * pack);
  int64_t row_blocks = column_blocks ? ceil_div(kBlocksWanted, column_blocks) : 1;
  if (row_blocks > ceil_div(rows, kRowsABlock)) row_blocks = ceil_div(rows, kRowsABlock);
  if (row_blocks < 1) row_blocks = 1;
  const int64_t rows_a_block = ceil_div(ceil_div(rows, row_blocks), kRowsAtOnce) * kRowsAtOnce;
  return {column_blocks, rows ? ceil_div(rows, rows_a_block) : 1, rows_a_block};
}

template <class T>
static cudaError_t launch(const T* g, int64_t rows, int64_t columns, const SampleSplit& split,
                          Compute<T>* norm_partials, Compute<T>* sum_partials, Compute<T>* sum,
                          Compute<T>* sum_sq, Compute<T>* norms_sq, cudaStream_t stream) {
  const bool split_rows = split.row_blocks > 1, split_columns = split.column_blocks != 1;
  if (columns > 0) {
    const bool aligned = reinterpret_cast<uintptr_t>(g) % 16 == 0 && columns * sizeof(T) % 16 == 0;
    const auto kernel =
        aligned ? sample_statistics_kernel<T, true> : sample_statistics_kernel<T, false>;
    const dim3 grid(static_cast<unsigned>(split.column_blocks),
                    static_cast<unsigned>(split.row_blocks));
    kernel<<<grid, kThreads, 0, stream>>>(
        g, rows, columns, split.rows_a_block, split_columns ? norm_partials : norms_sq,
        split_rows ? sum_partials : sum,
        split_rows ? sum_partials + split.row_blocks * columns : sum_sq);
  }
  if (columns > 0 && split_rows) {
    column_sums_kernel<<<static_cast<unsigned>(ceil_div(columns, kThreads)), kThreads, 0, stream>>>(
        sum_partials, split.row_blocks, columns, sum, sum_sq);
  }
  if (rows > 0 && split_columns) {
    row_norms_kernel<<<static_cast<unsigned>(rows), kThreads, 0, stream>>>(
        norm_partials, split.column_blocks, norms_sq);
  }
  return cudaGetLastError();
}

cudaError_t launch_sample_statistics(Type type, const void* g, int64_t rows, int64_t columns,
                                     const SampleSplit& split, void* norm_partials,
                                     void* sum_partials, void* sum, void* sum_sq, void* norms_sq,
                                     cudaStream_t stream) {
  const auto typed = [&](auto element) {
    using T = decltype(element);
    using A = Compute<T>;
    return launch<T>(static_cast<const T*>(g), rows, columns, split, static_cast<A*>(norm_partials),
                     static_cast<A*>(sum_partials), static_cast<A*>(sum), static_cast<A*>(sum_sq),
                     static_cast<A*>(norms_sq), stream);
  };
  switch (type) {
    case Type::f32:
      return typed(float());
    case Type::f64:
      return typed(double());
    case Type::bf16:
      return typed(__nv_bfloat16());
    case Type::f16:
      return typed(__half());
  }
  return cudaErrorInvalidValue;
}

}  // namespace adagrad_kernels
