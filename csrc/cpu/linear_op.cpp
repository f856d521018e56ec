#include "run_linear_update.h"
#include "run_weight_grad.h"

namespace adagrad_kernels {

namespace {

struct Operands {
  Tensor grad_out, input;  // contiguous [samples, positions, features], float or double
  int64_t samples, positions, out_features, in_features;
  // Whether the weight gradient is one matrix product over all positions, with norms apart.
  bool is_product(bool coordinates) const {
    return method_of(out_features, in_features, positions, coordinates, true) != Method::direct;
  }
};

Operands operands(const char* op, const Tensor& grad_out_any, const Tensor& input_any) {
  const Tensor grad_out = as_contiguous(as_compute(grad_out_any));
  const Tensor input = as_contiguous(as_compute(input_any));
  const int64_t dims = input.dim();
  STD_TORCH_CHECK(dims >= 2 && grad_out.dim() == dims && input.size(0) == grad_out.size(0) &&
                      input.scalar_type() == grad_out.scalar_type(),
                  op,
                  ": expected grad_out [b, ..., O] and input [b, ..., I] of one dtype, with the "
                  "same leading dimensions");
  int64_t positions = 1;
  for (int64_t d = 1; d < dims - 1; ++d) {
    STD_TORCH_CHECK(grad_out.size(d) == input.size(d), op,
                    ": grad_out and input differ in dimension ", d);
    positions *= input.size(d);
  }
  return {grad_out, input, input.size(0), positions, grad_out.size(dims - 1), input.size(dims - 1)};
}

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

// Everything but the weight gradient of a samples' matrix product, which product(positions of all
// samples) computes in its own way; samples of more positions take the direct kernel.
template <class T, class Product>
void linear_typed(const Operands& in, bool weight, bool bias, const Outputs& out,
                  const Tensor& grad_bias, const Tensor& bias_sums, const Tensor& probe,
                  const Product& product) {
  const T *grad_out = const_data<T>(in.grad_out), *input = const_data<T>(in.input);
  const int64_t samples = in.samples, positions = in.positions;
  if (positions == 1) {
    if (weight) product(samples);
    // bias_grad adds no norms here: outer_norms_range counts the bias.
    if (bias) bias_grad<T>(in.grad_out, samples, 1, grad_bias, bias_sums, nullptr);
    T* norms = data<T>(probe);
    parallel_for(0, samples, 65536 / (1 + in.in_features + in.out_features) + 1,
                 [&](int64_t begin, int64_t end) {
                   outer_norms_range<T>(grad_out, in.out_features, weight ? input : nullptr,
                                        in.in_features, bias, begin, end, norms);
                 });
    fill_probe<T>(probe, samples, [&](int64_t i) { return norms[i]; });
    return;
  }
  std::vector<double> norms(samples, 0.0);
  if (weight && in.is_product(out.grad_sq.numel() != 0)) {
    product(samples * positions);
    parallel_for(0, samples, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        norms[i] = gram_norm(grad_out + i * positions * in.out_features, in.out_features,
                             input + i * positions * in.in_features, in.in_features, positions);
      }
    });
  } else if (weight) {
    linear_direct<T>(in.grad_out, in.input, samples, positions, out, norms);
  }
  if (bias) bias_grad<T>(in.grad_out, samples, positions, grad_bias, bias_sums, norms.data());
  fill_probe<T>(probe, samples, [&](int64_t i) { return static_cast<T>(norms[i]); });
}

}  // namespace

LayerGrads linear_weight_grad_cpu(const Tensor& grad_out, const Tensor& input, int64_t capacity,
                                  bool weight, bool bias, bool coordinates) {
  const Operands in = operands("linear_weight_grad", grad_out, input);
  const Tensor& like = in.grad_out;
  const Tensor none = allocate(like, {0});
  Outputs out = {allocate(like, {0}), allocate(like, {0}), none, none};
  if (weight) {
    // Without samples nothing is written.
    const auto make = [&] {
      return in.samples * in.positions == 0 ? new_zeros(like, {in.out_features, in.in_features})
                                            : new_empty(like, {in.out_features, in.in_features});
    };
    out.grad = make();
    if (coordinates) out.grad_sq = make();
  }
  weight = out.grad.numel() != 0;
  Tensor grad_bias = allocate(like, {bias ? in.out_features : 0});
  Tensor bias_sums = allocate(like, {bias && coordinates ? in.out_features : 0});
  Tensor probe = make_probe(like, capacity, in.samples);
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    linear_typed<T>(in, weight, bias, out, grad_bias, bias_sums, probe,
                    [&](int64_t n) { linear_outer<T>(in.grad_out, in.input, n, out); });
  };
  is_double(like) ? run(0.0) : run(0.0f);
  return {out.grad, grad_bias, probe, out.grad_sq, bias_sums};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> linear_adagrad_cpu(
    const Tensor& grad_out, const Tensor& input, const Tensor& weight, const Tensor& sum,
    int64_t capacity, bool bias, bool coordinates, double lr, double eps, double weight_decay,
    bool maximize, double grad_scale) {
  const Operands in = operands("linear_adagrad_", grad_out, input);
  const Tensor& like = in.grad_out;
  for (const Tensor* t : {&weight, &sum}) {
    STD_TORCH_CHECK(t->dim() == 2 && t->size(0) == in.out_features &&
                        t->size(1) == in.in_features && t->is_contiguous(),
                    "linear_adagrad_: ", t == &sum ? "sum" : "weight",
                    " must be a contiguous tensor [", in.out_features, ", ", in.in_features, "]");
  }
  STD_TORCH_CHECK(sum.scalar_type() == compute_type(weight),
                  "linear_adagrad_: sum must be float32 (float64 where the weight is)");
  const int64_t samples = in.samples;
  if (weight.scalar_type() != like.scalar_type() || weight.numel() * samples * in.positions == 0 ||
      !in.is_product(coordinates)) {
    // Samples of many positions are bound by computation; the gradient is kept for a moment.
    auto [grad, grad_bias, probe, weight_sums, bias_sums] =
        linear_weight_grad_cpu(grad_out, input, capacity, true, bias, coordinates);
    std::vector<Tensor> squares;
    if (coordinates) squares.push_back(weight_sums);
    auto [norm, reductions] = adagrad_cpu({weight}, {grad}, {sum}, squares, lr, eps, weight_decay,
                                          maximize, grad_scale, samples);
    return {norm, reductions, grad_bias, probe, weight_sums, bias_sums};
  }
  const Tensor none = allocate(like, {0});
  Outputs out = {none, allocate(like, {0}), none, none};
  if (coordinates) out.grad_sq = new_empty(like, {in.out_features, in.in_features});
  Tensor grad_bias = allocate(like, {bias ? in.out_features : 0});
  Tensor bias_sums = allocate(like, {bias && coordinates ? in.out_features : 0});
  Tensor probe = make_probe(like, capacity, samples);
  const AdagradOptions options = {lr,         eps,      weight_decay,
                                  grad_scale, maximize, static_cast<double>(samples)};
  AdagradReductions reductions;
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    const auto update = [&](int64_t n) {
      const Outer<T> product = {const_data<T>(like),
                                const_data<T>(in.input),
                                n,
                                in.out_features,
                                in.in_features,
                                nullptr,
                                nullptr};
      LinearUpdate<T> a = {product, data<T>(weight), data<T>(sum), options};
      if (coordinates) a.product.grad_sq = data<T>(out.grad_sq);
      reductions = run_linear_update(a);
    };
    linear_typed<T>(in, true, bias, out, grad_bias, bias_sums, probe, update);
  };
  is_double(like) ? run(0.0) : run(0.0f);
  auto [norm, four] = as_tensors(like, reductions, coordinates);
  return {norm, four, grad_bias, probe, out.grad_sq, bias_sums};
}

}  // namespace adagrad_kernels
