#include <algorithm>
#include <memory>

#include "kernels.h"
#include "ops.h"

namespace adagrad_kernels {

using torch::stable::new_empty;
using torch::stable::new_zeros;
using torch::stable::parallel_for;

// Tasks take runs of columns: of kColumns, or shorter ones where that makes too few tasks. Where
// there are too few columns for that, they take runs of rows as well, with sums of their own that
// are added in a fixed order. The split depends on the shape alone: so do the results.
template <class T>
static void sample_statistics_into(const Tensor& g, const Tensor& sum, const Tensor& sum_sq,
                                   const Tensor& norms_sq) {
  constexpr int64_t kColumns = 16384, kFewColumns = 2048;
  constexpr int64_t kColumnTasks = 8, kRowTasks = 4, kWork = 32768;  // kWork: elements of a task
  const int64_t rows = g.size(0), columns = g.size(1);
  const int64_t column_parts =
      std::max({columns / kColumns, std::min(columns / kFewColumns, kColumnTasks), int64_t{1}});
  const int64_t row_parts =
      std::max<int64_t>(std::min({kRowTasks / column_parts, rows * columns / kWork, rows / 8}), 1);
  const int64_t parts = column_parts * row_parts;
  std::vector<double> norms(column_parts * rows, 0.0);
  const std::unique_ptr<T[]> partial(new T[2 * (row_parts - 1) * columns]);
  parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      const int64_t r = part / column_parts, c = part % column_parts;
      const int64_t first_row = rows * r / row_parts, last_row = rows * (r + 1) / row_parts;
      T* s = r == 0 ? data<T>(sum) : partial.get() + 2 * (r - 1) * columns;
      T* q = r == 0 ? data<T>(sum_sq) : s + columns;
      sample_statistics_range<T>(const_data<T>(g) + first_row * columns, last_row - first_row,
                                 columns, columns * c / column_parts,
                                 columns * (c + 1) / column_parts, s, q,
                                 norms.data() + c * rows + first_row);
    }
  });
  parallel_for(0, row_parts > 1 ? columns : 0, kColumns / 16, [&](int64_t begin, int64_t end) {
    for (int64_t r = 1; r < row_parts; ++r) {
      const T* s = partial.get() + 2 * (r - 1) * columns;
      for (int64_t j = begin; j < end; ++j) {
        data<T>(sum)[j] += s[j];
        data<T>(sum_sq)[j] += s[columns + j];
      }
    }
  });
  for (int64_t i = 0; i < rows; ++i) {
    double total = 0;
    for (int64_t c = 0; c < column_parts; ++c) total += norms[c * rows + i];
    data<T>(norms_sq)[i] = static_cast<T>(total);
  }
}

std::tuple<Tensor, Tensor, Tensor> sample_statistics_cpu(const Tensor& input) {
  STD_TORCH_CHECK(input.dim() == 2, "sample_statistics: expected g [b, P], got ", input.dim(),
                  " dimensions");
  const Tensor g = as_contiguous(as_compute(input));
  Tensor sum = new_empty(g, {g.size(1)}), sum_sq = new_empty(g, {g.size(1)});
  Tensor norms_sq = new_empty(g, {g.size(0)});
  if (is_double(g)) {
    sample_statistics_into<double>(g, sum, sum_sq, norms_sq);
  } else {
    sample_statistics_into<float>(g, sum, sum_sq, norms_sq);
  }
  return {sum, sum_sq, norms_sq};
}

template <class T>
static void pool_into(const std::vector<Tensor>& probes, const std::vector<int64_t>& rows, T* norms,
                      double* totals) {
  double sum = 0, least = -1, most = 0, outside = 0;
  for (size_t k = 0; k < probes.size(); ++k) {
    const int64_t capacity = probes[k].size(1), n = rows[k];
    const T* row = const_data<T>(probes[k]);
    const T* calls = row + capacity;
    for (int64_t i = 0; i < n; ++i) {
      sum += norms[i] = row[i];
      if (least < 0 || calls[i] < least) least = calls[i];
      if (calls[i] > most) most = calls[i];
    }
    for (int64_t i = n; i < capacity; ++i) outside = std::max<double>(outside, calls[i]);
    norms += n;
  }
  totals[0] = sum;
  totals[1] = least;
  totals[2] = most;
  totals[3] = outside;
}

std::tuple<Tensor, Tensor> pool_samples_cpu(const std::vector<Tensor>& probes,
                                            const std::vector<int64_t>& rows) {
  STD_TORCH_CHECK(!probes.empty() && probes.size() == rows.size(),
                  "pool_samples: expected one row count for each probe");
  int64_t total = 0;
  for (size_t k = 0; k < probes.size(); ++k) {
    STD_TORCH_CHECK(probes[k].dim() == 2 && probes[k].size(0) == 2 && probes[k].is_contiguous() &&
                        probes[k].scalar_type() == probes[0].scalar_type(),
                    "pool_samples: expected contiguous probes [2, capacity] of one dtype");
    STD_TORCH_CHECK(rows[k] >= 0 && rows[k] <= probes[k].size(1), "pool_samples: ", rows[k],
                    " rows in a probe of capacity ", probes[k].size(1));
    total += rows[k];
  }
  Tensor norms = new_empty(probes[0], {total});
  Tensor totals = new_empty(probes[0], {4}, ScalarType::Double);
  if (is_double(norms)) {
    pool_into(probes, rows, data<double>(norms), data<double>(totals));
  } else {
    pool_into(probes, rows, data<float>(norms), data<double>(totals));
  }
  return {norms, totals};
}

}  // namespace adagrad_kernels
