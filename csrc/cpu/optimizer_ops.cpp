#include <algorithm>
#include <cmath>

#include "kernels.h"
#include "ops.h"
#include "reductions.h"

namespace adagrad_kernels {

using torch::stable::new_empty;

namespace {

// One parameter as flat memory. Parameter, gradient and accumulator must be laid out alike:
// the gradient is copied to the parameter's layout where it is not; low-precision parameters
// are updated through a float32 copy.
struct Slot {
  size_t index;
  Tensor param, work, grad, sum, coordinate_sums;
};

std::vector<Slot> make_slots(const std::vector<Tensor>& params, const std::vector<Tensor>& grads,
                             const std::vector<Tensor>* sums,
                             const std::vector<Tensor>& coordinate_sums) {
  const size_t n = params.size();
  STD_TORCH_CHECK(grads.size() == n && (!sums || sums->size() == n) &&
                      (coordinate_sums.empty() || coordinate_sums.size() == n),
                  "adagrad: params, grads, sums and coordinate_sums differ in length");
  std::vector<Slot> slots;
  slots.reserve(n);
  for (size_t i = 0; i < n; ++i) {
    STD_TORCH_CHECK(dense(params[i]), "adagrad: parameter ", i, " has gaps or overlaps in memory");
    const Tensor work = as_compute(params[i]);
    Slot slot = {i,    params[i],
                 work, laid_out_as(grads[i], work, work.scalar_type(), "gradient", i),
                 work, work};
    if (sums) {
      slot.sum = (*sums)[i];
      STD_TORCH_CHECK(slot.sum.scalar_type() == work.scalar_type() && same_layout(slot.sum, work),
                      "adagrad: accumulator ", i,
                      " must have its parameter's shape and layout, in float32 (float64 where "
                      "the parameter is)");
    }
    if (!coordinate_sums.empty()) {
      slot.coordinate_sums =
          laid_out_as(coordinate_sums[i], work, work.scalar_type(), "coordinate sum", i);
    }
    slots.push_back(slot);
  }
  return slots;
}

void write_back(const std::vector<Slot>& slots) {
  for (const Slot& slot : slots) {
    if (slot.param.get() == slot.work.get()) continue;
    Tensor param = slot.param;
    torch::stable::copy_(param, slot.work);
  }
}

// Runs kernel(slot, first, n) over all tensors in pieces of equal size and adds the results in
// the order of the pieces: the same result whatever the number of threads.
template <class Kernel>
AdagradReductions over_all(const std::vector<Slot>& slots, const Kernel& kernel) {
  constexpr int64_t kPiece = 16384;
  struct Piece {
    size_t slot;
    int64_t first, n;
  };
  std::vector<Piece> pieces;
  int64_t total = 0;
  for (size_t i = 0; i < slots.size(); ++i) {
    const int64_t numel = slots[i].work.numel();
    for (int64_t first = 0; first < numel; first += kPiece) {
      pieces.push_back({i, first, std::min(kPiece, numel - first)});
    }
    total += numel;
  }
  std::vector<AdagradReductions> parts(pieces.size());
  const auto run = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      parts[i] = kernel(slots[pieces[i].slot], pieces[i].first, pieces[i].n);
    }
  };
  const int64_t count = static_cast<int64_t>(pieces.size());
  if (total < 2 * kPiece) {
    run(0, count);  // starting the other threads would cost more
  } else {
    torch::stable::parallel_for(0, count, 1, run);
  }
  AdagradReductions sum;
  for (const AdagradReductions& part : parts) add(sum, part);
  return sum;
}

template <class T>
const T* offset(const Tensor& t, int64_t first) {
  return const_data<T>(t) + first;
}

}  // namespace

std::tuple<Tensor, Tensor> adagrad_cpu(const std::vector<Tensor>& params,
                                       const std::vector<Tensor>& grads,
                                       const std::vector<Tensor>& sums,
                                       const std::vector<Tensor>& coordinate_sums, double lr,
                                       double eps, double weight_decay, bool maximize,
                                       double grad_scale, int64_t samples) {
  STD_TORCH_CHECK(!params.empty(), "adagrad_: no parameters");
  const AdagradOptions options = {lr,         eps,      weight_decay,
                                  grad_scale, maximize, static_cast<double>(samples)};
  const bool coordinates = !coordinate_sums.empty();
  const std::vector<Slot> slots = make_slots(params, grads, &sums, coordinate_sums);
  const auto typed = [&](auto zero, const Slot& s, int64_t first, int64_t n) {
    using T = decltype(zero);
    return adagrad_range<T>(
        data<T>(s.work) + first, offset<T>(s.grad, first), data<T>(s.sum) + first,
        coordinates ? offset<T>(s.coordinate_sums, first) : nullptr, n, options);
  };
  const AdagradReductions total = over_all(slots, [&](const Slot& s, int64_t first, int64_t n) {
    return is_double(s.work) ? typed(0.0, s, first, n) : typed(0.0f, s, first, n);
  });
  write_back(slots);
  return as_tensors(params[0], total, coordinates);
}

std::tuple<Tensor, Tensor> adagrad_norm_cpu(const std::vector<Tensor>& params,
                                            const std::vector<Tensor>& grads, const Tensor& sum,
                                            const std::vector<Tensor>& coordinate_sums,
                                            const std::vector<double>& lr, double eps,
                                            const std::vector<double>& weight_decay, bool maximize,
                                            double grad_scale, int64_t samples) {
  STD_TORCH_CHECK(!params.empty(), "adagrad_norm_: no parameters");
  STD_TORCH_CHECK(sum.numel() == 1 && is_double(sum),
                  "adagrad_norm_: sum must be one float64 number");
  STD_TORCH_CHECK(lr.size() == params.size() && weight_decay.size() == params.size(),
                  "adagrad_norm_: expected one lr and one weight_decay for each parameter");
  const auto options = [&](const Slot& s) {
    return AdagradOptions{lr[s.index], eps,      weight_decay[s.index],
                          grad_scale,  maximize, static_cast<double>(samples)};
  };
  const bool coordinates = !coordinate_sums.empty();
  const std::vector<Slot> slots = make_slots(params, grads, nullptr, coordinate_sums);
  const auto reduce = [&](auto zero, const Slot& s, int64_t first, int64_t n) {
    using T = decltype(zero);
    return adagrad_norm_reduce_range<T>(offset<T>(s.work, first), offset<T>(s.grad, first), n,
                                        options(s));
  };
  AdagradReductions total = over_all(slots, [&](const Slot& s, int64_t first, int64_t n) {
    return is_double(s.work) ? reduce(0.0, s, first, n) : reduce(0.0f, s, first, n);
  });
  double* accumulator = data<double>(sum);
  *accumulator += total.decayed_norm_sq;
  const double denominator = std::sqrt(*accumulator) + eps;
  const auto update = [&](auto zero, const Slot& s, int64_t first, int64_t n) {
    using T = decltype(zero);
    return adagrad_norm_update_range<T>(data<T>(s.work) + first, offset<T>(s.grad, first),
                                        coordinates ? offset<T>(s.coordinate_sums, first) : nullptr,
                                        n, denominator, options(s));
  };
  const AdagradReductions rest = over_all(slots, [&](const Slot& s, int64_t first, int64_t n) {
    return is_double(s.work) ? update(0.0, s, first, n) : update(0.0f, s, first, n);
  });
  const double grad_norm_sq = total.grad_norm_sq;
  total = rest;
  total.grad_norm_sq = grad_norm_sq;
  write_back(slots);
  return as_tensors(params[0], total, coordinates);
}

Tensor grad_norm_sq_cpu(const std::vector<Tensor>& tensors) {
  STD_TORCH_CHECK(!tensors.empty(), "grad_norm_sq: no tensors");
  std::vector<Slot> slots;
  slots.reserve(tensors.size());
  for (size_t i = 0; i < tensors.size(); ++i) {
    const Tensor t = as_compute(tensors[i]);
    const Tensor work = dense(t) ? t : as_contiguous(t);
    slots.push_back({i, tensors[i], work, work, work, work});
  }
  AdagradOptions options = {};
  options.grad_scale = 1;
  const auto reduce = [&](auto zero, const Slot& s, int64_t first, int64_t n) {
    using T = decltype(zero);
    return adagrad_norm_reduce_range<T>(nullptr, offset<T>(s.grad, first), n, options);
  };
  const AdagradReductions total = over_all(slots, [&](const Slot& s, int64_t first, int64_t n) {
    return is_double(s.work) ? reduce(0.0, s, first, n) : reduce(0.0f, s, first, n);
  });
  return std::get<0>(as_tensors(tensors[0], total, false));
}

}  // namespace adagrad_kernels
