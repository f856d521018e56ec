#include "run_weight_grad.h"

namespace adagrad_kernels {

namespace {

// The bias gradient of a linear layer with its statistics; norms are added to.
template <class T>
void bias_grad(const Tensor& grad_out, int64_t samples, int64_t positions, const Tensor& sum,
               const Tensor& sum_sq, double* norms) {
  const int64_t features = sum.size(0);
  const bool coordinates = sum_sq.numel() != 0;
  const int64_t work = samples * positions * features;
  const int64_t parts = work < 65536 ? 1 : std::min<int64_t>(get_num_threads(), samples);
  Scratch<T> buffers(parts * 3 * features);
  std::fill(buffers.get(), buffers.get() + parts * 3 * features, T(0));
  parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      T* own = buffers.get() + p * 3 * features;
      bias_range<T>(const_data<T>(grad_out), positions, features, samples * p / parts,
                    samples * (p + 1) / parts, own, coordinates ? own + features : nullptr, norms,
                    own + 2 * features);
    }
  });
  for (int64_t j = 0; j < features; ++j) {
    T s = 0, q = 0;
    for (int64_t p = 0; p < parts; ++p) {
      s += buffers.get()[p * 3 * features + j];
      q += buffers.get()[(p * 3 + 1) * features + j];
    }
    data<T>(sum)[j] = s;
    if (coordinates) data<T>(sum_sq)[j] = q;
  }
}

template <class T>
void linear_direct(const Tensor& grad_out, const Tensor& input, int64_t samples, int64_t positions,
                   const Outputs& out, std::vector<double>& norms) {
  const int64_t out_features = out.grad.size(0), in_features = out.grad.size(1);
  std::vector<int64_t> base(out_features);
  for (int64_t m = 0; m < out_features; ++m) base[m] = m;
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
  a.count[0] = a.count[1] = 1;
  a.count[2] = positions;
  a.step[2] = out_features;
  run_weight_grad(a, 1, samples, false, out.grad_sq.numel() != 0, out, norms);
}

template <class T>
void linear_typed(const Tensor& grad_out, const Tensor& input, int64_t samples, int64_t positions,
                  bool bias, const Outputs& out, const Tensor& grad_bias, const Tensor& bias_sums,
                  const Tensor& probe) {
  const bool weight = out.grad.numel() != 0;
  const int64_t out_features = grad_out.size(grad_out.dim() - 1);
  if (positions == 1) {
    // bias_grad adds no norms here: outer_norms_range counts the bias.
    if (bias) bias_grad<T>(grad_out, samples, 1, grad_bias, bias_sums, nullptr);
    const int64_t in_features = input.size(input.dim() - 1);
    T* norms = data<T>(probe);
    parallel_for(0, samples, 1 + 65536 / (in_features + out_features),
                 [&](int64_t begin, int64_t end) {
                   outer_norms_range<T>(const_data<T>(grad_out), out_features,
                                        weight ? const_data<T>(input) : nullptr, in_features, bias,
                                        begin, end, norms);
                 });
    fill_probe<T>(probe, samples, [&](int64_t i) { return norms[i]; });
    return;
  }
  std::vector<double> norms(samples, 0.0);
  if (weight) linear_direct<T>(grad_out, input, samples, positions, out, norms);
  if (bias) bias_grad<T>(grad_out, samples, positions, grad_bias, bias_sums, norms.data());
  fill_probe<T>(probe, samples, [&](int64_t i) { return static_cast<T>(norms[i]); });
}

Tensor square(const Tensor& t) {
  Tensor out = torch::stable::empty_like(t);
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    const T* in = const_data<T>(t);
    T* to = data<T>(out);
    parallel_for(0, t.numel(), 32768, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) to[i] = in[i] * in[i];
    });
  };
  is_double(t) ? run(0.0) : run(0.0f);
  return out;
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
  for (int64_t d = 1; d < dims - 1; ++d) positions *= input.size(d);
  STD_TORCH_CHECK(grad_out.numel() == samples * positions * out_features,
                  "linear_weight_grad: grad_out and input differ in their leading dimensions");
  Outputs out = {new_empty(grad_out, {0}), new_empty(grad_out, {0}), new_empty(grad_out, {0}),
                 new_empty(grad_out, {0})};
  const bool products = positions == 1 && weight;  // T = 1: matrix products do the sums
  if (products) {
    const Tensor g = torch::stable::reshape(grad_out, {samples, out_features});
    const Tensor x = torch::stable::reshape(input, {samples, in_features});
    out.grad = torch::stable::matmul(torch::stable::transpose(g, 0, 1), x);
    if (coordinates) {
      out.grad_sq = torch::stable::matmul(torch::stable::transpose(square(g), 0, 1), square(x));
    }
  } else if (weight) {
    out.grad = new_zeros(grad_out, {out_features, in_features});
    if (coordinates) out.grad_sq = new_zeros(grad_out, {out_features, in_features});
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
