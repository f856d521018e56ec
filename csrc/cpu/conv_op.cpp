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
struct Images {
  Images() = default;
  explicit Images(const Tensor& given) : tensor(given) {
    const int64_t missing = 5 - tensor.dim();
    for (int64_t d = 4; d >= 0; --d) {
      const bool there = d < 2 || d >= 2 + missing;
      const int64_t from = d < 2 ? d : d - missing;
      sizes[d] = there ? tensor.size(from) : 1;
      strides[d] = there ? tensor.stride(from) : sizes[d + 1] * strides[d + 1];
    }
  }
  int64_t size(int64_t d) const { return sizes[d]; }
  int64_t stride(int64_t d) const { return strides[d]; }

  Tensor tensor;
  int64_t sizes[5], strides[5];
};

// A convolution's weight gradient as weight_grad.inl sees it.
struct Convolution {
  Images grad_out, input;  // float or double
  int64_t groups, samples, channels, out_channels, members, padding[3], padded[3];
  std::vector<int64_t> base, position;

  // Without a weight gradient the image has no members: only the bias is summed.
  Convolution(const char* op, const Tensor& grad_out_any, const Tensor& input_any,
              const std::vector<int64_t>& kernel_size, const std::vector<int64_t>& stride_any,
              const std::vector<int64_t>& padding_any, const std::vector<int64_t>& dilation_any,
              int64_t groups_any, bool weight)
      : groups(groups_any) {
    const size_t dims = kernel_size.size();
    STD_TORCH_CHECK(dims >= 1 && dims <= 3 && stride_any.size() == dims &&
                        padding_any.size() == dims && dilation_any.size() == dims,
                    op,
                    ": kernel_size, stride, padding and dilation take one number a spatial "
                    "dimension, for one to three of them");
    STD_TORCH_CHECK(grad_out_any.dim() == input_any.dim() &&
                        input_any.dim() == static_cast<int64_t>(dims) + 2 &&
                        input_any.size(0) == grad_out_any.size(0) &&
                        input_any.scalar_type() == grad_out_any.scalar_type(),
                    op, ": expected grad_out [b, O, *D'] and input [b, C, *D] of one dtype, with ",
                    dims, " spatial dimensions");
    STD_TORCH_CHECK(
        groups > 0 && input_any.size(1) % groups == 0 && grad_out_any.size(1) % groups == 0, op,
        ": ", input_any.size(1), " input and ", grad_out_any.size(1),
        " output channels do not divide into ", groups, " groups");
    grad_out = Images(as_compute(grad_out_any));
    input = Images(as_compute(input_any));
    const Three kernel(kernel_size, 1), stride(stride_any, 1), zeros(padding_any, 0);
    const Three dilation(dilation_any, 1);
    // The kernel walks the positions of grad_out by one stride.
    if (grad_out.stride(3) != grad_out.size(4) * grad_out.stride(4) ||
        (grad_out.size(2) > 1 && grad_out.stride(2) != grad_out.size(3) * grad_out.stride(3))) {
      grad_out = Images(as_contiguous(grad_out.tensor));
    }
    samples = input.size(0), channels = input.size(1) / groups, out_channels = grad_out.size(1);
    for (int64_t d = 0; d < 3; ++d) {
      padding[d] = zeros[d];
      padded[d] = input.size(2 + d) + 2 * padding[d];
      STD_TORCH_CHECK(
          (grad_out.size(2 + d) - 1) * stride[d] + (kernel[d] - 1) * dilation[d] + 1 <= padded[d],
          op, ": grad_out is larger than this convolution's output");
    }
    members = weight ? channels * kernel[0] * kernel[1] * kernel[2] : 0;
    for (int64_t m = 0; m < members; ++m) {
      const int64_t kw = m % kernel[2], kh = m / kernel[2] % kernel[1];
      const int64_t kf = m / kernel[2] / kernel[1] % kernel[0];
      const int64_t c = m / kernel[2] / kernel[1] / kernel[0];
      const int64_t row = (c * padded[0] + kf * dilation[0]) * padded[1] + kh * dilation[1];
      base.push_back(row * padded[2] + kw * dilation[2]);
    }
    for (int64_t f = 0; f < grad_out.size(2); ++f) {
      for (int64_t h = 0; h < grad_out.size(3); ++h) {
        const int64_t row = f * stride[0] * padded[1] + h * stride[1];
        for (int64_t w = 0; w < grad_out.size(4); ++w) {
          position.push_back(row * padded[2] + w * stride[2]);
        }
      }
    }
  }

  template <class T>
  WeightGrad<T> operands() const {
    WeightGrad<T> a = {};
    a.wide = const_data<T>(grad_out.tensor);
    a.wide_sample = grad_out.stride(0);
    a.wide_lane = grad_out.stride(1);
    a.wide_position = grad_out.stride(4);
    a.lanes = out_channels / groups;
    a.panel_width = panel_width<T>(a.lanes);
    a.narrow = const_data<T>(input.tensor);
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
    return a;
  }

  // An output like the operands, not initialised unless nothing will be written; [0] if unwanted.
  Tensor output(bool wanted, const std::vector<int64_t>& shape) const {
    if (!wanted) return allocate(grad_out.tensor, {0});
    return samples > 0 ? allocate(grad_out.tensor, shape) : new_zeros(grad_out.tensor, shape);
  }
};

}  // namespace

LayerGrads conv_weight_grad_cpu(const Tensor& grad_out, const Tensor& input,
                                const std::vector<int64_t>& kernel_size,
                                const std::vector<int64_t>& stride,
                                const std::vector<int64_t>& padding,
                                const std::vector<int64_t>& dilation, int64_t groups,
                                int64_t capacity, bool weight, bool bias, bool coordinates) {
  const Convolution conv("conv_weight_grad", grad_out, input, kernel_size, stride, padding,
                         dilation, groups, weight);
  std::vector<int64_t> shape = {conv.out_channels, conv.channels};
  shape.insert(shape.end(), kernel_size.begin(), kernel_size.end());
  const Outputs out = {conv.output(weight, shape), conv.output(weight && coordinates, shape),
                       conv.output(bias, {conv.out_channels}),
                       conv.output(bias && coordinates, {conv.out_channels})};
  const Tensor probe = make_probe(conv.grad_out.tensor, capacity, conv.samples);
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    std::vector<double> norms(conv.samples, 0.0);
    run_weight_grad(conv.operands<T>(), groups, conv.samples, true, coordinates, out, norms);
    fill_probe<T>(probe, conv.samples, [&](int64_t i) { return static_cast<T>(norms[i]); });
  };
  is_double(conv.grad_out.tensor) ? run(0.0) : run(0.0f);
  return {out.grad, out.wide_grad, probe, out.grad_sq, out.wide_grad_sq};
}

std::tuple<Tensor, Tensor> conv_sample_grads_cpu(const Tensor& grad_out, const Tensor& input,
                                                 const std::vector<int64_t>& kernel_size,
                                                 const std::vector<int64_t>& stride,
                                                 const std::vector<int64_t>& padding,
                                                 const std::vector<int64_t>& dilation,
                                                 int64_t groups, bool weight, bool bias) {
  const Convolution conv("conv_sample_grads", grad_out, input, kernel_size, stride, padding,
                         dilation, groups, weight);
  std::vector<int64_t> shape = {conv.samples, conv.out_channels, conv.channels};
  shape.insert(shape.end(), kernel_size.begin(), kernel_size.end());
  const Tensor grads = conv.output(weight, shape);
  const Tensor bias_grads = conv.output(bias, {conv.samples, conv.out_channels});
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    run_sample_grads(conv.operands<T>(), groups, conv.samples, data<T>(grads),
                     bias ? data<T>(bias_grads) : nullptr);
  };
  is_double(conv.grad_out.tensor) ? run(0.0) : run(0.0f);
  return {grads, bias_grads};
}

}  // namespace adagrad_kernels
