#include "launch.h"
#include "ops.h"

namespace adagrad_kernels {

using torch::stable::new_empty;

std::tuple<Tensor, Tensor, Tensor> sample_statistics_cuda(const Tensor& input) {
  STD_TORCH_CHECK(input.dim() == 2, "sample_statistics: expected g [b, P], got ", input.dim(),
                  " dimensions");
  const Launch launch(input);
  const Tensor g = torch::stable::contiguous(input);
  const Type type = type_of(g);
  const ScalarType result = compute_type(g);
  const int64_t rows = g.size(0), columns = g.size(1);
  const SampleSplit split = split_samples(type, rows, columns);
  Tensor sum = new_empty(g, {columns}, result), sum_sq = new_empty(g, {columns}, result);
  Tensor norms_sq = new_empty(g, {rows}, result);
  const int64_t norm_parts = split.column_blocks > 1 ? rows * split.column_blocks : 0;
  const int64_t sum_parts = split.row_blocks > 1 ? 2 * split.row_blocks * columns : 0;
  Tensor norm_partials = new_empty(g, {norm_parts}, result);
  Tensor sum_partials = new_empty(g, {sum_parts}, result);
  check(launch_sample_statistics(type, g.const_data_ptr(), rows, columns, split,
                                 norm_partials.mutable_data_ptr(), sum_partials.mutable_data_ptr(),
                                 sum.mutable_data_ptr(), sum_sq.mutable_data_ptr(),
                                 norms_sq.mutable_data_ptr(), launch.stream),
        "sample_statistics");
  return {sum, sum_sq, norms_sq};
}

}  // namespace adagrad_kernels
