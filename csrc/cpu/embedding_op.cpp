#include <numeric>

#include "layer_ops.h"

namespace adagrad_kernels {

namespace {

// For each sample its positions in the order of their tokens, equal tokens by position.
std::vector<int64_t> token_order(const int64_t* tokens, int64_t samples, int64_t positions) {
  std::vector<int64_t> order(samples * positions);
  parallel_for(0, samples, 1 + 4096 / (positions + 1), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      int64_t* own = order.data() + i * positions;
      const int64_t* of = tokens + i * positions;
      std::iota(own, own + positions, int64_t{0});
      std::stable_sort(own, own + positions, [of](int64_t a, int64_t b) { return of[a] < of[b]; });
    }
  });
  return order;
}

template <class T>
void run(EmbeddingGrad<T>& a, const Tensor& probe) {
  constexpr int64_t kColumns = 512 / sizeof(T);  // of the narrowest task
  const int64_t blocks = ceil_div(a.width, kColumns);
  const int64_t parts = std::clamp<int64_t>(blocks, 1, kTasks);
  std::vector<double> norms(parts * a.samples, 0.0);
  parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      const int64_t first = std::min(a.width, blocks * p / parts * kColumns);
      const int64_t last = std::min(a.width, blocks * (p + 1) / parts * kColumns);
      Scratch<T> scratch(last - first);
      embedding_range(a, first, last, norms.data() + p * a.samples, scratch.get());
    }
  });
  fill_probe<T>(probe, a.samples, [&](int64_t i) {
    double norm = 0;
    for (int64_t p = 0; p < parts; ++p) norm += norms[p * a.samples + i];
    return static_cast<T>(norm);
  });
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> embedding_weight_grad_cpu(const Tensor& grad_out_any,
                                                             const Tensor& indices_any,
                                                             int64_t num_embeddings,
                                                             int64_t padding_idx, int64_t capacity,
                                                             bool coordinates) {
  const Tensor grad_out = as_contiguous(as_compute(grad_out_any));
  STD_TORCH_CHECK(
      indices_any.scalar_type() == ScalarType::Long || indices_any.scalar_type() == ScalarType::Int,
      "embedding_weight_grad: indices must be int64 or int32");
  const Tensor indices = as_contiguous(converted(indices_any, ScalarType::Long));
  const int64_t dims = indices.dim();
  bool fits = dims >= 1 && grad_out.dim() == dims + 1;
  for (int64_t d = 0; fits && d < dims; ++d) fits = indices.size(d) == grad_out.size(d);
  STD_TORCH_CHECK(fits,
                  "embedding_weight_grad: expected grad_out [b, ..., D] and indices [b, ...] with "
                  "the same leading dimensions");
  const int64_t samples = indices.size(0), width = grad_out.size(dims);
  int64_t positions = 1;
  for (int64_t d = 1; d < dims; ++d) positions *= indices.size(d);
  const int64_t* tokens = const_data<int64_t>(indices);
  for (int64_t k = 0; k < samples * positions; ++k) {
    STD_TORCH_CHECK(tokens[k] >= 0 && tokens[k] < num_embeddings, "embedding_weight_grad: token ",
                    tokens[k], " is not in [0, ", num_embeddings, ")");
  }
  const Tensor grad = new_zeros(grad_out, {num_embeddings, width});
  const Tensor sums =
      coordinates ? new_zeros(grad_out, {num_embeddings, width}) : allocate(grad_out, {0});
  const Tensor probe = make_probe(grad_out, capacity, samples);
  const std::vector<int64_t> order = token_order(tokens, samples, positions);
  const auto typed = [&](auto zero) {
    using T = decltype(zero);
    EmbeddingGrad<T> a = {const_data<T>(grad_out),
                          tokens,
                          order.data(),
                          samples,
                          positions,
                          width,
                          padding_idx,
                          data<T>(grad),
                          coordinates ? data<T>(sums) : nullptr};
    run(a, probe);
  };
  is_double(grad_out) ? typed(0.0) : typed(0.0f);
  return {grad, probe, sums};
}

}  // namespace adagrad_kernels
