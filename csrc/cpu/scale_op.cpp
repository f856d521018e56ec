#include "scale_outputs.h"

namespace adagrad_kernels {

namespace {

// A statistic broadcast over [b, T, C, S]: memory and the stride of b, T and C.
struct Broadcast {
  Tensor values;
  int64_t stride[3];
};

Broadcast broadcast(const std::optional<Tensor>& given, double fill, const Tensor& like) {
  if (!given) {
    Tensor one = new_empty(like, {1});
    return {torch::stable::fill_(one, fill), {0, 0, 0}};
  }
  STD_TORCH_CHECK(given->dim() == 4, "scale_weight_grad: mean and rstd have four dimensions");
  Broadcast b = {converted(*given, like.scalar_type()), {0, 0, 0}};
  for (int64_t d = 0; d < 4; ++d) {
    const int64_t size = b.values.size(d);
    STD_TORCH_CHECK(size == 1 || (d < 3 && size == like.size(d)),
                    "scale_weight_grad: mean and rstd must have size 1 or that of grad_out in "
                    "dimensions 0 to 2, and size 1 in the last");
    if (d < 3 && size > 1) b.stride[d] = b.values.stride(d);
  }
  return b;
}

template <class T>
void run(const ScaleGrad<T>& a, int64_t samples, const ScaleOutputs& outputs, const Tensor& probe) {
  const int64_t channels = a.channels;
  Scratch<T> total(4 * channels);
  std::vector<double> norms(samples, 0.0);
  sum_over_samples(samples, samples * a.positions * channels * a.inner, 4 * channels, 2 * channels,
                   total.get(), [&](int64_t first, int64_t last, T* own, T* scratch) {
                     scale_range(a, first, last, outputs.in(own, channels), norms.data(), scratch);
                   });
  outputs.copy_from(total.get(), channels);
  fill_probe<T>(probe, samples, [&](int64_t i) { return static_cast<T>(norms[i]); });
}

}  // namespace

LayerGrads scale_weight_grad_cpu(const Tensor& grad_out_any, const Tensor& input_any,
                                 const std::optional<Tensor>& mean_any,
                                 const std::optional<Tensor>& rstd_any, int64_t capacity,
                                 bool weight, bool bias, bool coordinates) {
  const Tensor grad_out = as_contiguous(as_compute(grad_out_any));
  const Tensor input = as_contiguous(converted(input_any, grad_out.scalar_type()));
  bool fits = grad_out.dim() == 4 && input.dim() == 4;
  for (int64_t d = 0; fits && d < 4; ++d) fits = grad_out.size(d) == input.size(d);
  STD_TORCH_CHECK(fits, "scale_weight_grad: expected grad_out and input of one shape [b, T, C, S]");
  const int64_t samples = grad_out.size(0), channels = grad_out.size(2);
  const Broadcast mean = broadcast(mean_any, 0, grad_out), rstd = broadcast(rstd_any, 1, grad_out);
  const ScaleOutputs outputs(grad_out, channels, weight, bias, coordinates);
  const Tensor probe = make_probe(grad_out, capacity, samples);
  const auto typed = [&](auto zero) {
    using T = decltype(zero);
    ScaleGrad<T> a;
    a.grad_out = const_data<T>(grad_out);
    a.input = const_data<T>(input);
    a.mean = const_data<T>(mean.values);
    a.rstd = const_data<T>(rstd.values);
    a.mean_sample = mean.stride[0], a.mean_position = mean.stride[1];
    a.mean_channel = mean.stride[2];
    a.rstd_sample = rstd.stride[0], a.rstd_position = rstd.stride[1];
    a.rstd_channel = rstd.stride[2];
    a.positions = grad_out.size(1);
    a.channels = channels;
    a.inner = grad_out.size(3);
    run(a, samples, outputs, probe);
  };
  is_double(grad_out) ? typed(0.0) : typed(0.0f);
  return {outputs.grad[0], outputs.grad[1], probe, outputs.sums[0], outputs.sums[1]};
}

}  // namespace adagrad_kernels
