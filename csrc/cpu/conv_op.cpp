#include "run_weight_grad.h"

namespace adagrad_kernels {

namespace {

// A list of one, two or three numbers as three, missing leading dimensions filled.
struct Three {
  Three(const std::vector<int64_t>& given, int64_t fill) : value{fill, fill, fill} {
    std::copy(given.begin(), given.end(), value + 3 - given.size());
  }
  int64_t operator[](int64_t d) const { return value[d]; }
  int64_t value[3];
};

// [b, C, *D] with the missing leading spatial dimensions as size one.
Tensor with_three_dimensions(Tensor t) {
  while (t.dim() < 5) t = torch::stable::unsqueeze(t, 2);
  return t;
}

}  // namespace

LayerGrads conv_weight_grad_cpu(const Tensor& grad_out_any, const Tensor& input_any,
                                const std::vector<int64_t>& kernel_size,
                                const std::vector<int64_t>& stride_any,
                                const std::vector<int64_t>& padding_any,
                                const std::vector<int64_t>& dilation_any, int64_t groups,
                                int64_t capacity, bool weight, bool bias, bool coordinates) {
  const size_t dims = kernel_size.size();
  STD_TORCH_CHECK(dims >= 1 && dims <= 3 && stride_any.size() == dims &&
                      padding_any.size() == dims && dilation_any.size() == dims,
                  "conv_weight_grad: kernel_size, stride, padding and dilation take one number a "
                  "spatial dimension, for one to three of them");
  STD_TORCH_CHECK(grad_out_any.dim() == input_any.dim() &&
                      input_any.dim() == static_cast<int64_t>(dims) + 2 &&
                      input_any.size(0) == grad_out_any.size(0) &&
                      input_any.scalar_type() == grad_out_any.scalar_type(),
                  "conv_weight_grad: expected grad_out [b, O, *D'] and input [b, C, *D] of one "
                  "dtype, with ",
                  dims, " spatial dimensions");
  STD_TORCH_CHECK(
      groups > 0 && input_any.size(1) % groups == 0 && grad_out_any.size(1) % groups == 0,
      "conv_weight_grad: ", input_any.size(1), " input and ", grad_out_any.size(1),
      " output channels do not divide into ", groups, " groups");
  Tensor grad_out = with_three_dimensions(as_compute(grad_out_any));
  const Tensor input = with_three_dimensions(as_compute(input_any));
  const Three kernel(kernel_size, 1), stride(stride_any, 1), padding(padding_any, 0);
  const Three dilation(dilation_any, 1);
  // The kernel walks the positions of grad_out by one stride.
  if (grad_out.stride(3) != grad_out.size(4) * grad_out.stride(4) ||
      (grad_out.size(2) > 1 && grad_out.stride(2) != grad_out.size(3) * grad_out.stride(3))) {
    grad_out = torch::stable::contiguous(grad_out);
  }
  const int64_t samples = input.size(0), channels = input.size(1) / groups;
  const int64_t out_channels = grad_out.size(1);
  int64_t padded[3];
  for (int64_t d = 0; d < 3; ++d) {
    padded[d] = input.size(2 + d) + 2 * padding[d];
    STD_TORCH_CHECK(
        (grad_out.size(2 + d) - 1) * stride[d] + (kernel[d] - 1) * dilation[d] + 1 <= padded[d],
        "conv_weight_grad: grad_out is larger than this convolution's output");
  }
  // Without a weight gradient the image has no members: only the bias is summed.
  const int64_t members = weight ? channels * kernel[0] * kernel[1] * kernel[2] : 0;
  std::vector<int64_t> base(members);
  for (int64_t m = 0; m < members; ++m) {
    const int64_t kw = m % kernel[2], kh = m / kernel[2] % kernel[1];
    const int64_t kf = m / kernel[2] / kernel[1] % kernel[0];
    const int64_t c = m / kernel[2] / kernel[1] / kernel[0];
    const int64_t row = (c * padded[0] + kf * dilation[0]) * padded[1] + kh * dilation[1];
    base[m] = row * padded[2] + kw * dilation[2];
  }
  std::vector<int64_t> position;
  for (int64_t f = 0; f < grad_out.size(2); ++f) {
    for (int64_t h = 0; h < grad_out.size(3); ++h) {
      const int64_t row = f * stride[0] * padded[1] + h * stride[1];
      for (int64_t w = 0; w < grad_out.size(4); ++w) {
        position.push_back(row * padded[2] + w * stride[2]);
      }
    }
  }
  const auto output = [&](bool wanted, const std::vector<int64_t>& shape) {
    if (!wanted) return new_empty(grad_out, {0});
    return samples > 0 ? new_empty(grad_out, shape) : new_zeros(grad_out, shape);
  };
  std::vector<int64_t> shape = {out_channels, channels};
  shape.insert(shape.end(), kernel_size.begin(), kernel_size.end());
  const Outputs out = {output(weight, shape), output(weight && coordinates, shape),
                       output(bias, {out_channels}), output(bias && coordinates, {out_channels})};
  const Tensor probe = make_probe(grad_out, capacity, samples);
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    WeightGrad<T> a = {};
    a.wide = const_data<T>(grad_out);
    a.wide_sample = grad_out.stride(0);
    a.wide_lane = grad_out.stride(1);
    a.wide_position = grad_out.stride(4);
    a.lanes = out_channels / groups;
    a.panel_width = panel_width<T>(a.lanes);
    a.narrow = const_data<T>(input);
    a.narrow_sample = input.stride(0);
    a.narrow_channel = input.stride(1);
    a.narrow_frame = input.stride(2);
    a.narrow_row = input.stride(3);
    a.narrow_column = input.stride(4);
    a.channels = channels;
    a.frames = input.size(2);
    a.rows = input.size(3);
    a.columns = input.size(4);
    a.pad_front = padding[0];
    a.pad_top = padding[1];
    a.pad_left = padding[2];
    a.depth = padded[0];
    a.height = padded[1];
    a.width = padded[2];
    a.base = base.data();
    a.members = members;
    a.position = position.data();
    a.positions = static_cast<int64_t>(position.size());
    std::vector<double> norms(samples, 0.0);
    run_weight_grad(a, groups, samples, true, coordinates, out, norms);
    fill_probe<T>(probe, samples, [&](int64_t i) { return static_cast<T>(norms[i]); });
  };
  is_double(grad_out) ? run(0.0) : run(0.0f);
  return {out.grad, out.wide_grad, probe, out.grad_sq, out.wide_grad_sq};
}

}  // namespace adagrad_kernels
