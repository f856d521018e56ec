#include <algorithm>
#include <memory>

#include "kernels.h"
#include "ops.h"

namespace adagrad_kernels {

using torch::stable::get_num_threads;
using torch::stable::new_empty;
using torch::stable::new_zeros;
using torch::stable::parallel_for;

namespace {

// Memory aligned for full vectors, not initialised.
template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t n) : memory_(new T[n + 64 / sizeof(T)]) {
    const auto address = reinterpret_cast<uintptr_t>(memory_.get());
    aligned_ = reinterpret_cast<T*>((address + 63) / 64 * 64);
  }
  T* get() const { return aligned_; }

 private:
  std::unique_ptr<T[]> memory_;
  T* aligned_;
};

Tensor make_probe(const Tensor& like, int64_t capacity, int64_t samples) {
  STD_TORCH_CHECK(samples <= capacity, "adagrad_kernels: ", samples,
                  " samples do not fit a probe of capacity ", capacity);
  return new_empty(like, {2, capacity});
}

// Row 0: norms, row 1: one call for each of the samples; zero beyond them.
template <class T, class Norm>
void fill_probe(const Tensor& probe, int64_t samples, const Norm& norm) {
  const int64_t capacity = probe.size(1);
  T* out = data<T>(probe);
  for (int64_t i = 0; i < samples; ++i) out[i] = norm(i);
  std::fill(out + samples, out + capacity, T(0));
  std::fill(out + capacity, out + capacity + samples, T(1));
  std::fill(out + capacity + samples, out + 2 * capacity, T(0));
}

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

// How weight_grad_range's work is split: every task has a run of samples and a run of panels of
// one group. Small weights split the samples, each part with sums of its own; large ones split
// the panels, so that no second copy of the sums is needed.
struct Split {
  int64_t groups, sample_parts, panel_parts, panels, panel_elements;
  int64_t tasks() const { return groups * sample_parts * panel_parts; }
  int64_t sums() const { return groups * panels * panel_elements; }  // of one sample part
};

template <class T>
Split split_work(const WeightGrad<T>& a, int64_t groups, int64_t samples) {
  const int64_t threads = get_num_threads();
  Split s;
  s.groups = groups;
  s.panels = ceil_div(a.lanes, a.panel_width);
  s.panel_elements = a.members * a.panel_width;
  const int64_t wanted = ceil_div(threads, groups);
  const bool large = s.panels * s.panel_elements >= (1 << 17);
  s.panel_parts = large ? std::min(wanted, s.panels) : 1;
  s.sample_parts = std::clamp<int64_t>(wanted / s.panel_parts, 1, samples);
  if (!large) s.panel_parts = std::clamp<int64_t>(wanted / s.sample_parts, 1, s.panels);
  return s;
}

struct Outputs {
  Tensor grad, grad_sq;            // grad_sq empty without coordinates
  Tensor wide_grad, wide_grad_sq;  // the bias of a convolution, or empty
};

template <class T>
void add_parts(const T* parts, int64_t stride, int64_t count, T* out, int64_t n) {
  for (int64_t p = 0; p < count; ++p) {
    for (int64_t j = 0; j < n; ++j) out[j] += parts[p * stride + j];
  }
}

// lanes_outer: the weight's rows are lanes (convolution) or members (linear).
template <class T>
void run_weight_grad(const WeightGrad<T>& common, int64_t groups, int64_t samples, bool lanes_outer,
                     bool coordinates, const Outputs& out, std::vector<double>& norms) {
  constexpr int64_t kChunkBytes = 384 << 10;  // operands of a chunk: well inside L2
  const Split split = split_work(common, groups, samples);
  const bool bias = out.wide_grad.numel() != 0;
  const int64_t positions = common.outer_positions * common.inner_positions;
  const int64_t image = common.channels * common.height * common.width;
  const int64_t width = common.panel_width, bias_size = groups * split.panels * width;
  const int64_t sums = split.sums() * (coordinates ? 2 : 1);
  const int64_t own = sums + bias_size * 2;  // weight sums, their squares, bias sums, squares
  Scratch<T> totals(split.sample_parts * own);
  std::vector<double> task_norms(split.tasks() * samples, 0.0);
  parallel_for(0, split.tasks(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t g = task % groups, pp = task / groups % split.panel_parts;
      const int64_t sp = task / groups / split.panel_parts;
      const int64_t first_panel = split.panels * pp / split.panel_parts;
      const int64_t last_panel = split.panels * (pp + 1) / split.panel_parts;
      const int64_t panels = last_panel - first_panel;
      const int64_t sample_size = panels * positions * width + image + 16;
      WeightGrad<T> a = common;
      a.wide += g * a.lanes * a.wide_lane;
      a.narrow += g * a.channels * a.narrow_channel;
      T* base = totals.get() + sp * own;
      a.sum = base + g * split.panels * split.panel_elements;
      a.sum_sq = coordinates ? a.sum + split.sums() : nullptr;
      a.wide_sum = bias ? base + sums + g * split.panels * width : nullptr;
      a.wide_sum_sq = bias && coordinates ? a.wide_sum + bias_size : nullptr;
      for (T* region : {a.sum, a.sum_sq}) {
        if (region) {
          std::fill(region + first_panel * split.panel_elements,
                    region + last_panel * split.panel_elements, T(0));
        }
      }
      for (T* region : {a.wide_sum, a.wide_sum_sq}) {
        if (region) std::fill(region + first_panel * width, region + last_panel * width, T(0));
      }
      a.norms = task_norms.data() + task * samples;
      a.chunk = std::clamp<int64_t>(kChunkBytes / (sample_size * sizeof(T)), 1, samples);
      Scratch<T> scratch(a.chunk * sample_size);
      a.scratch = scratch.get();
      weight_grad_range(a, samples * sp / split.sample_parts,
                        samples * (sp + 1) / split.sample_parts, first_panel, last_panel);
    }
  });
  const int64_t row = lanes_outer ? common.members : common.lanes;
  parallel_for(0, groups * split.panels, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t g = i / split.panels, panel = i % split.panels;
      const int64_t lanes = std::min(width, common.lanes - panel * width);
      for (int64_t k = 0; k < (coordinates ? 2 : 1); ++k) {
        T* sum = totals.get() + k * split.sums() + i * split.panel_elements;
        add_parts(sum + own, own, split.sample_parts - 1, sum, split.panel_elements);
        T* to = data<T>(k ? out.grad_sq : out.grad) +
                (lanes_outer ? (g * common.lanes + panel * width) * row : panel * width);
        unpack_panel(sum, common.members, width, lanes, lanes_outer, row, to);
        if (!bias) continue;
        T* bias_sum = totals.get() + sums + k * bias_size + i * width;
        add_parts(bias_sum + own, own, split.sample_parts - 1, bias_sum, width);
        std::copy(bias_sum, bias_sum + lanes,
                  data<T>(k ? out.wide_grad_sq : out.wide_grad) + g * common.lanes + panel * width);
      }
    }
  });
  for (int64_t task = 0; task < split.tasks(); ++task) {
    for (int64_t i = 0; i < samples; ++i) norms[i] += task_norms[task * samples + i];
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
  a.narrow_sample = a.narrow_channel = positions * out_features;
  a.narrow_row = out_features;
  a.narrow_column = a.channels = 1;
  a.rows = a.height = positions;
  a.columns = a.width = out_features;
  a.base = base.data();
  a.members = out_features;
  a.outer_positions = 1;
  a.inner_positions = positions;
  a.inner_step = out_features;
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

LayerGrads conv2d_weight_grad_cpu(const Tensor& grad_out_any, const Tensor& input_any,
                                  const std::vector<int64_t>& kernel_size,
                                  const std::vector<int64_t>& stride,
                                  const std::vector<int64_t>& padding,
                                  const std::vector<int64_t>& dilation, int64_t groups,
                                  int64_t capacity, bool weight, bool bias, bool coordinates) {
  Tensor grad_out = as_compute(grad_out_any);
  const Tensor input = as_compute(input_any);
  STD_TORCH_CHECK(grad_out.dim() == 4 && input.dim() == 4 && input.size(0) == grad_out.size(0) &&
                      input.scalar_type() == grad_out.scalar_type(),
                  "conv2d_weight_grad: expected grad_out [b, O, H', W'] and input [b, C, H, W] of "
                  "one dtype");
  STD_TORCH_CHECK(groups > 0 && input.size(1) % groups == 0 && grad_out.size(1) % groups == 0,
                  "conv2d_weight_grad: ", input.size(1), " input and ", grad_out.size(1),
                  " output channels do not divide into ", groups, " groups");
  STD_TORCH_CHECK(
      kernel_size.size() == 2 && stride.size() == 2 && padding.size() == 2 && dilation.size() == 2,
      "conv2d_weight_grad: kernel_size, stride, padding and dilation take two numbers");
  if (grad_out.stride(2) != grad_out.size(3) * grad_out.stride(3)) {
    grad_out = torch::stable::contiguous(grad_out);  // the kernel walks positions by one stride
  }
  const int64_t samples = input.size(0), channels = input.size(1) / groups;
  const int64_t out_channels = grad_out.size(1), out_h = grad_out.size(2), out_w = grad_out.size(3);
  const int64_t kernel_h = kernel_size[0], kernel_w = kernel_size[1];
  const int64_t height = input.size(2) + 2 * padding[0], width = input.size(3) + 2 * padding[1];
  STD_TORCH_CHECK((out_h - 1) * stride[0] + (kernel_h - 1) * dilation[0] + 1 <= height &&
                      (out_w - 1) * stride[1] + (kernel_w - 1) * dilation[1] + 1 <= width,
                  "conv2d_weight_grad: grad_out is larger than this convolution's output");
  // Without a weight gradient the image has no members: only the bias is summed.
  const int64_t members = weight ? channels * kernel_h * kernel_w : 0;
  std::vector<int64_t> base(members);
  for (int64_t m = 0; m < members; ++m) {
    const int64_t kw = m % kernel_w, kh = m / kernel_w % kernel_h, c = m / kernel_w / kernel_h;
    base[m] = (c * height + kh * dilation[0]) * width + kw * dilation[1];
  }
  const auto output = [&](bool wanted, std::vector<int64_t> shape) {
    return new_zeros(grad_out, wanted ? shape : std::vector<int64_t>{0});
  };
  const std::vector<int64_t> shape = {out_channels, channels, kernel_h, kernel_w};
  const Outputs out = {output(weight, shape), output(weight && coordinates, shape),
                       output(bias, {out_channels}), output(bias && coordinates, {out_channels})};
  const Tensor probe = make_probe(grad_out, capacity, samples);
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    WeightGrad<T> a = {};
    a.wide = const_data<T>(grad_out);
    a.wide_sample = grad_out.stride(0);
    a.wide_lane = grad_out.stride(1);
    a.wide_position = grad_out.stride(3);
    a.lanes = out_channels / groups;
    a.panel_width = panel_width<T>(a.lanes);
    a.narrow = const_data<T>(input);
    a.narrow_sample = input.stride(0);
    a.narrow_channel = input.stride(1);
    a.narrow_row = input.stride(2);
    a.narrow_column = input.stride(3);
    a.channels = channels;
    a.rows = input.size(2);
    a.columns = input.size(3);
    a.pad_top = padding[0];
    a.pad_left = padding[1];
    a.height = height;
    a.width = width;
    a.base = base.data();
    a.members = members;
    a.outer_positions = out_h;
    a.inner_positions = out_w;
    a.outer_step = stride[0] * width;
    a.inner_step = stride[1];
    std::vector<double> norms(samples, 0.0);
    if (samples > 0) run_weight_grad(a, groups, samples, true, coordinates, out, norms);
    fill_probe<T>(probe, samples, [&](int64_t i) { return static_cast<T>(norms[i]); });
  };
  is_double(grad_out) ? run(0.0) : run(0.0f);
  return {out.grad, out.wide_grad, probe, out.grad_sq, out.wide_grad_sq};
}

}  // namespace adagrad_kernels
