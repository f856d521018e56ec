#include "run_weight_grad.h"

namespace adagrad_kernels {

namespace {

// The bias gradient of a linear layer with its statistics; norms are added to.
template <class T>
void bias_grad(const Tensor& grad_out, int64_t samples, int64_t positions, const Tensor& sum,
               const Tensor& sum_sq, double* norms) {
  const int64_t features = sum.size(0);
  const bool coordinates = sum_sq.numel() != 0;
  Scratch<T> total(2 * features);
  sum_over_samples(samples, samples * positions * features, 2 * features, features, total.get(),
                   [&](int64_t first, int64_t last, T* sums, T* scratch) {
                     bias_range<T>(const_data<T>(grad_out), positions, features, first, last, sums,
                                   coordinates ? sums + features : nullptr, norms, scratch);
                   });
  std::copy(total.get(), total.get() + features, data<T>(sum));
  if (coordinates) {
    std::copy(total.get() + features, total.get() + 2 * features, data<T>(sum_sq));
  }
}

template <class T>
void linear_direct(const Tensor& grad_out, const Tensor& input, int64_t samples, int64_t positions,
                   const Outputs& out, std::vector<double>& norms) {
  const int64_t out_features = out.grad.size(0), in_features = out.grad.size(1);
  std::vector<int64_t> base(out_features);
  for (int64_t m = 0; m < out_features; ++m) base[m] = m;
  std::vector<int64_t> position(positions);
  for (int64_t t = 0; t < positions; ++t) position[t] = t * out_features;
  WeightGrad<T> a = {};
  a.wide = const_data<T>(input);
  a.wide_sample = positions * in_features;
  a.wide_position = in_features;
  a.wide_lane = 1;
  a.lanes = in_features;
  a.panel_width = panel_width<T>(a.lanes);
  a.narrow = const_data<T>(grad_out);  // an image of one channel: rows t, columns o
  a.narrow_sample = a.narrow_channel = a.narrow_frame = positions * out_features;
  a.narrow_row = out_features;
  a.narrow_column = a.channels = a.frames = a.depth = 1;
  a.rows = a.height = positions;
  a.columns = a.width = out_features;
  a.base = base.data();
  a.members = out_features;
  a.position = position.data();
  a.positions = positions;
  run_weight_grad(a, 1, samples, false, out.grad_sq.numel() != 0, out, norms);
}

// Samples of one position: matrix products, of the squares as well where they are wanted.
template <class T>
void linear_outer(const Tensor& grad_out, const Tensor& input, int64_t samples,
                  const Outputs& out) {
  const bool squares = out.grad_sq.numel() != 0;
  const Outer<T> a = {const_data<T>(grad_out),
                      const_data<T>(input),
                      samples,
                      out.grad.size(0),
                      out.grad.size(1),
                      data<T>(out.grad),
                      squares ? data<T>(out.grad_sq) : nullptr};
  const OuterTiles tiles = outer_tiles(a);
  const int64_t threads = samples * a.rows * a.columns < 65536 ? 1 : get_num_threads();
  Scratch<T> packed(tiles.packed * tiles.row_tiles * samples);
  const auto pack = [&](int64_t begin, int64_t end) {
    outer_pack_range(a, begin, end, packed.get());
  };
  // Parts of the rows as well where there are too few panels for an even load.
  const int64_t parts = std::clamp<int64_t>(ceil_div(4 * threads, tiles.panels), 1,
                                            std::max<int64_t>(tiles.row_tiles / 4, 1));
  const auto compute = [&](int64_t begin, int64_t end) {
    Scratch<T> scratch(std::min(samples, kOuterChunk) * tiles.width);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t part = task % parts;
      outer_panel_range(a, packed.get(), task / parts, tiles.row_tiles * part / parts,
                        tiles.row_tiles * (part + 1) / parts, scratch.get());
    }
  };
  if (threads == 1) {
    pack(0, tiles.row_tiles);
    compute(0, tiles.panels * parts);
  } else {
    parallel_for(0, tiles.row_tiles, 1, pack);
    parallel_for(0, tiles.panels * parts, 1, compute);
  }
}

template <class T>
void linear_typed(const Tensor& grad_out, const Tensor& input, int64_t samples, int64_t positions,
                  bool bias, const Outputs& out, const Tensor& grad_bias, const Tensor& bias_sums,
                  const Tensor& probe) {
  const bool weight = out.grad.numel() != 0;
  const int64_t out_features = grad_out.size(grad_out.dim() - 1);
  if (positions == 1) {
    if (weight) linear_outer<T>(grad_out, input, samples, out);
    // bias_grad adds no norms here: outer_norms_range counts the bias.
    if (bias) bias_grad<T>(grad_out, samples, 1, grad_bias, bias_sums, nullptr);
    const int64_t in_features = input.size(input.dim() - 1);
    T* norms = data<T>(probe);
    parallel_for(0, samples, 65536 / (1 + in_features + out_features) + 1,
                 [&](int64_t begin, int64_t end) {
                   outer_norms_range<T>(const_data<T>(grad_out), out_features,
                                        weight ? const_data<T>(input) : nullptr, in_features, bias,
                                        begin, end, norms);
                 });
    fill_probe<T>(probe, samples, [&](int64_t i) { return norms[i]; });
    return;
  }
  std::vector<double> norms(samples, 0.0);
  const int64_t in_features = input.size(input.dim() - 1);
  if (weight && !out.grad_sq.numel() && gram_is_cheaper(out_features, in_features, positions)) {
    linear_outer<T>(grad_out, input, samples * positions, out);
    parallel_for(0, samples, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        norms[i] =
            gram_norm(const_data<T>(grad_out) + i * positions * out_features, out_features,
                      const_data<T>(input) + i * positions * in_features, in_features, positions);
      }
    });
  } else if (weight) {
    linear_direct<T>(grad_out, input, samples, positions, out, norms);
  }
  if (bias) bias_grad<T>(grad_out, samples, positions, grad_bias, bias_sums, norms.data());
  fill_probe<T>(probe, samples, [&](int64_t i) { return static_cast<T>(norms[i]); });
}

}  // namespace

LayerGrads linear_weight_grad_cpu(const Tensor& grad_out_any, const Tensor& input_any,
                                  int64_t capacity, bool weight, bool bias, bool coordinates) {
  const Tensor grad_out = torch::stable::contiguous(as_compute(grad_out_any));
  const Tensor input = torch::stable::contiguous(as_compute(input_any));
  const int64_t dims = input.dim();
  STD_TORCH_CHECK(dims >= 2 && grad_out.dim() == dims && input.size(0) == grad_out.size(0) &&
                      input.scalar_type() == grad_out.scalar_type(),
                  "linear_weight_grad: expected grad_out [b, ..., O] and input [b, ..., I] of one "
                  "dtype, with the same leading dimensions");
  const int64_t samples = input.size(0), in_features = input.size(dims - 1);
  const int64_t out_features = grad_out.size(dims - 1);
  int64_t positions = 1;
  for (int64_t d = 1; d < dims - 1; ++d) {
    STD_TORCH_CHECK(grad_out.size(d) == input.size(d),
                    "linear_weight_grad: grad_out and input differ in dimension ", d);
    positions *= input.size(d);
  }
  Outputs out = {new_empty(grad_out, {0}), new_empty(grad_out, {0}), new_empty(grad_out, {0}),
                 new_empty(grad_out, {0})};
  if (weight) {
    // Without samples nothing is written.
    const auto make = [&] {
      return samples * positions == 0 ? new_zeros(grad_out, {out_features, in_features})
                                      : new_empty(grad_out, {out_features, in_features});
    };
    out.grad = make();
    if (coordinates) out.grad_sq = make();
  }
  Tensor grad_bias = new_empty(grad_out, {bias ? out_features : 0});
  Tensor bias_sums = new_empty(grad_out, {bias && coordinates ? out_features : 0});
  Tensor probe = make_probe(grad_out, capacity, samples);
  if (is_double(grad_out)) {
    linear_typed<double>(grad_out, input, samples, positions, bias, out, grad_bias, bias_sums,
                         probe);
  } else {
    linear_typed<float>(grad_out, input, samples, positions, bias, out, grad_bias, bias_sums,
                        probe);
  }
  return {out.grad, grad_bias, probe, out.grad_sq, bias_sums};
}

}  // namespace adagrad_kernels
