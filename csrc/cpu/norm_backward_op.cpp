#include "scale_outputs.h"

namespace adagrad_kernels {

namespace {

template <class T>
void whole_batch(const NormBackward<T>& a, const ScaleOutputs& outputs, T* total, double* norms) {
  // Runs of some kilobytes in each sample: parts of rows where channels are last, else channels.
  const int64_t size = a.channels_last ? 4 : std::max<int64_t>(a.inner, 1);
  const int64_t block = std::clamp<int64_t>(1024 / size, 1, kBatchBlock);
  const int64_t blocks = ceil_div(a.channels, block);
  Scratch<T> own_table(a.sample_grads ? 0 : 2 * a.samples * a.channels);
  T* table = a.sample_grads ? a.sample_grads : own_table.get();
  parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      norm_channels_range(a, k * block, std::min((k + 1) * block, a.channels), table);
    }
  });
  sum_over_samples(a.samples, 2 * a.samples * a.channels, 4 * a.channels, 0, total,
                   [&](int64_t first, int64_t last, T* own, T*) {
                     add_samples_range(table, a.channels, first, last, outputs.in(own, a.channels),
                                       norms);
                   });
}

template <class T>
void by_samples(const NormBackward<T>& a, const ScaleOutputs& outputs, T* total, double* norms) {
  const int64_t c = a.channels;
  sum_over_samples(a.samples, a.samples * a.positions * c * a.inner, 4 * c, 8 * c, total,
                   [&](int64_t first, int64_t last, T* own, T* scratch) {
                     norm_samples_range(a, first, last, outputs.in(own, c), norms, scratch);
                   });
}

// The same with bfloat16 operands, which are widened one sample at a time: no copies of them in
// memory. Those of `a` are not used.
void by_samples_of_bfloat16(const NormBackward<float>& a, const Tensor& grad_out,
                            const Tensor& input, const Tensor& grad_input,
                            const ScaleOutputs& outputs, float* total, double* norms) {
  const int64_t c = a.channels, size = a.positions * c * a.inner, each = a.positions * a.groups;
  const auto *g = const_data<uint16_t>(grad_out), *x = const_data<uint16_t>(input);
  auto* dx = data<uint16_t>(grad_input);
  sum_over_samples(a.samples, a.samples * size, 4 * c, 8 * c, total,
                   [&](int64_t first, int64_t last, float* own, float* scratch) {
                     Scratch<float> wide(3 * size);
                     NormBackward<float> one = a;
                     one.grad_out = wide.get();
                     one.input = wide.get() + size;
                     one.grad_input = wide.get() + 2 * size;
                     for (int64_t i = first; i < last; ++i) {
                       bfloat16_to_float(g + i * size, size, wide.get());
                       bfloat16_to_float(x + i * size, size, wide.get() + size);
                       if (a.mean) one.mean = a.mean + i * each;
                       one.rstd = a.rstd + i * each;
                       if (a.sample_grads) one.sample_grads = a.sample_grads + 2 * i * c;
                       norm_samples_range(one, 0, 1, outputs.in(own, c), norms + i, scratch);
                       float_to_bfloat16(one.grad_input, size, dx + i * size);
                     }
                   });
}

// Whether [b, T, C, S] lies in memory as [b, T, S, C].
bool is_channels_last(const Tensor& t) {
  int64_t run = 1;
  for (const int64_t d : {2, 3, 1, 0}) {
    if (t.size(d) > 1 && t.stride(d) != run) return false;
    run *= t.size(d);
  }
  return true;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> norm_backward_cpu(
    const Tensor& grad_out_any, const Tensor& input_any, const std::optional<Tensor>& mean_any,
    const Tensor& rstd_any, const Tensor& scale_any, int64_t capacity, bool weight, bool bias,
    bool coordinates, bool samples_wanted) {
  bool fits = grad_out_any.dim() == 4 && input_any.dim() == 4;
  for (int64_t d = 0; fits && d < 4; ++d) fits = grad_out_any.size(d) == input_any.size(d);
  STD_TORCH_CHECK(fits, "norm_backward: expected grad_out and input of one shape [b, T, C, S]");
  const int64_t samples = input_any.size(0), positions = input_any.size(1);
  const int64_t channels = input_any.size(2), inner = input_any.size(3);
  STD_TORCH_CHECK(scale_any.dim() == 1 && scale_any.size(0) == channels,
                  "norm_backward: expected a scale [C]");
  fits = rstd_any.dim() == 4 && rstd_any.size(3) == 1 && rstd_any.size(1) == positions;
  const int64_t groups = fits ? rstd_any.size(2) : 0;
  const bool by_sample = fits && rstd_any.size(0) == samples &&
                         (groups == channels || (groups > 0 && channels % groups == 0));
  const bool of_batch = fits && rstd_any.size(0) == 1 && positions == 1 && groups == channels;
  if (mean_any) fits = mean_any->dim() == 4;
  for (int64_t d = 0; mean_any && fits && d < 4; ++d) fits = mean_any->size(d) == rstd_any.size(d);
  STD_TORCH_CHECK(fits && (by_sample || (of_batch && mean_any)),
                  "norm_backward: expected mean and rstd [b, T, groups, 1], or both [1, 1, C, 1] "
                  "of the batch");

  const ScalarType type = compute_type(input_any);
  const bool bfloat16 = by_sample && input_any.scalar_type() == ScalarType::BFloat16;
  const Tensor given = bfloat16 ? input_any : as_compute(input_any);
  const bool channels_last = inner == 1 || (!given.is_contiguous() && is_channels_last(given));
  const Tensor input = channels_last && inner > 1 ? given : as_contiguous(given);
  const auto same_as_input = [&](const Tensor& t) {
    const ScalarType same = input.scalar_type();
    const Tensor found = converted(t, same);
    if (same_layout(found, input)) return found;
    Tensor copy = torch::stable::empty_like(input);
    return torch::stable::copy_(copy, found);
  };
  const auto flat = [&](const Tensor& t) { return as_contiguous(converted(t, type)); };
  const Tensor grad_out = same_as_input(grad_out_any);
  const Tensor rstd = flat(rstd_any), mean = mean_any ? flat(*mean_any) : rstd;
  const Tensor scale = flat(scale_any);
  Tensor grad_input = torch::stable::empty_like(input_any);
  const bool direct =
      grad_input.scalar_type() == input.scalar_type() && same_layout(grad_input, input);
  const Tensor result = direct ? grad_input : torch::stable::empty_like(input);
  const ScaleOutputs outputs(rstd, channels, weight, bias, coordinates);
  const Tensor probe = make_probe(rstd, capacity, samples);
  const Tensor sample_grads = allocate(rstd, {samples_wanted ? samples : 0, 2, channels});
  const auto typed = [&](auto zero) {
    using T = decltype(zero);
    const NormBackward<T> a = {const_data<T>(grad_out),
                               const_data<T>(input),
                               mean_any ? const_data<T>(mean) : nullptr,
                               const_data<T>(rstd),
                               const_data<T>(scale),
                               samples,
                               positions,
                               channels,
                               inner,
                               groups,
                               channels_last,
                               data<T>(result),
                               samples_wanted ? data<T>(sample_grads) : nullptr};
    Scratch<T> total(4 * channels);
    std::vector<double> norms(samples, 0.0);
    if constexpr (sizeof(T) == sizeof(float)) {
      if (bfloat16) {
        by_samples_of_bfloat16(a, grad_out, input, result, outputs, total.get(), norms.data());
      }
    }
    if (!bfloat16) {
      (by_sample ? by_samples<T> : whole_batch<T>)(a, outputs, total.get(), norms.data());
    }
    outputs.copy_from(total.get(), channels);
    fill_probe<T>(probe, samples, [&](int64_t i) { return static_cast<T>(norms[i]); });
  };
  type == ScalarType::Double ? typed(0.0) : typed(0.0f);
  if (!direct) torch::stable::copy_(grad_input, result);
  return {grad_input,      outputs.grad[0], outputs.grad[1], probe,
          outputs.sums[0], outputs.sums[1], sample_grads};
}

}  // namespace adagrad_kernels
