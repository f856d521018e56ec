#include <algorithm>

#include "launch.h"
#include "ops.h"

namespace adagrad_kernels {

using torch::stable::new_empty;

namespace {

struct Slot {
  Type param, grad;
  TensorItem item;
};

// What the kernels are told of each tensor. Copies made to lay things out alike live here until
// the launch; torch's allocator keeps their memory until the kernels have run.
struct Slots {
  std::vector<Slot> slots;
  std::vector<Tensor> copies;

  const void* keep(const Tensor& t, const Tensor& original) {
    if (t.get() != original.get()) copies.push_back(t);
    return t.const_data_ptr();
  }
};

struct Tables {
  Type param, grad;  // of all items
  TensorTable table;
  int64_t first_block;  // where this table's blocks lie in the partials
};

bool is_aligned(const TensorItem& item) {
  uintptr_t bits = 0;
  for (const void* p : {static_cast<const void*>(item.param), item.grad,
                        static_cast<const void*>(item.sum), item.coordinate_sums}) {
    bits |= reinterpret_cast<uintptr_t>(p);
  }
  return bits % 16 == 0;
}

// At least 2048 blocks where there is work for them, of 1024 to 16384 elements: the same for
// the same sizes on every device, and with it the order of every sum.
int64_t chunk_for(int64_t elements) {
  constexpr int64_t kUnit = 1024, kBlocks = 2048, kMost = 16;
  return kUnit * std::clamp<int64_t>(ceil_div(elements, kUnit * kBlocks), 1, kMost);
}

// The launches: one for every kMaxItems tensors of the same types.
std::vector<Tables> make_tables(const std::vector<Slot>& slots, int64_t* blocks) {
  int64_t elements = 0;
  for (const Slot& slot : slots) elements += slot.item.numel;
  const int64_t chunk = chunk_for(elements);
  std::vector<Tables> tables;
  for (const Slot& slot : slots) {
    if (slot.item.numel == 0) continue;
    auto fits = std::find_if(tables.begin(), tables.end(), [&](const Tables& t) {
      return t.param == slot.param && t.grad == slot.grad && t.table.count < kMaxItems;
    });
    if (fits == tables.end()) {
      tables.push_back({slot.param, slot.grad, {}, 0});
      tables.back().table.chunk = chunk;
      fits = tables.end() - 1;
    }
    TensorTable& table = fits->table;
    TensorItem& item = table.items[table.count++] = slot.item;
    item.first_block = table.blocks;
    item.aligned = is_aligned(item);
    table.blocks += static_cast<int32_t>(ceil_div(item.numel, chunk));
  }
  *blocks = 0;
  for (Tables& t : tables) {
    t.first_block = *blocks;
    *blocks += t.table.blocks;
  }
  return tables;
}

Slots make_slots(const std::vector<Tensor>& params, const std::vector<Tensor>& grads,
                 const std::vector<Tensor>* sums, const std::vector<Tensor>& coordinate_sums) {
  const size_t n = params.size();
  STD_TORCH_CHECK(grads.size() == n && (!sums || sums->size() == n) &&
                      (coordinate_sums.empty() || coordinate_sums.size() == n),
                  "adagrad: params, grads, sums and coordinate_sums differ in length");
  const int32_t device = params[0].get_device_index();
  const auto here = [&](const Tensor& t) { return t.is_cuda() && t.get_device_index() == device; };
  Slots result;
  result.slots.reserve(n);
  for (size_t i = 0; i < n; ++i) {
    const Tensor& param = params[i];
    STD_TORCH_CHECK(here(param) && here(grads[i]) && (!sums || here((*sums)[i])) &&
                        (coordinate_sums.empty() || here(coordinate_sums[i])),
                    "adagrad: parameter ", i, " and what belongs to it must be on one device");
    STD_TORCH_CHECK(dense(param), "adagrad: parameter ", i, " has gaps or overlaps in memory");
    const ScalarType type = compute_type(param);
    const bool same = grads[i].scalar_type() == param.scalar_type();
    const Tensor grad =
        laid_out_as(grads[i], param, same ? param.scalar_type() : type, "gradient", i);
    TensorItem item = {};
    item.param = param.mutable_data_ptr();
    item.grad = result.keep(grad, grads[i]);
    item.numel = param.numel();
    if (sums) {
      const Tensor& sum = (*sums)[i];
      STD_TORCH_CHECK(sum.scalar_type() == type && same_layout(sum, param), "adagrad: accumulator ",
                      i,
                      " must have its parameter's shape and layout, in float32 (float64 where "
                      "the parameter is)");
      item.sum = sum.mutable_data_ptr();
    }
    if (!coordinate_sums.empty()) {
      const Tensor& sum = coordinate_sums[i];
      item.coordinate_sums = result.keep(laid_out_as(sum, param, type, "coordinate sum", i), sum);
    }
    result.slots.push_back({type_of(param), type_of(grad), item});
  }
  return result;
}

// Partial sums of all blocks, and the jobs that reduce them.
class Reductions {
 public:
  Reductions(const Tensor& like, int64_t blocks)
      : blocks_(blocks), data_(new_empty(like, {kRows, blocks}, ScalarType::Double)) {}

  Partials of(const Tables& tables) const {
    return {data<double>(data_) + tables.first_block, blocks_};
  }

  void reduce(AdagradRow row, double* out, bool add = false) {
    jobs_.jobs[jobs_.count++] = {data<double>(data_) + row * blocks_, blocks_, out, row == kRatio,
                                 add};
  }
  // The rows of coordinates into [4], in the order of the op's result.
  void reduce_coordinates(double* out) {
    for (AdagradRow row : {kVariance, kRatio, kVarianceMetric, kGradMetric}) reduce(row, out++);
  }
  void run(const char* op, cudaStream_t stream) {
    check(launch_reduce(jobs_, stream), op);
    jobs_.count = 0;
  }

 private:
  int64_t blocks_;
  Tensor data_;
  ReduceJobs jobs_ = {};
};

}  // namespace

std::tuple<Tensor, Tensor> adagrad_cuda(const std::vector<Tensor>& params,
                                        const std::vector<Tensor>& grads,
                                        const std::vector<Tensor>& sums,
                                        const std::vector<Tensor>& coordinate_sums, double lr,
                                        double eps, double weight_decay, bool maximize,
                                        double grad_scale, int64_t samples) {
  STD_TORCH_CHECK(!params.empty(), "adagrad_: no parameters");
  const Launch launch(params[0]);
  const bool coordinates = !coordinate_sums.empty();
  const AdagradOptions options = {lr,         eps,      weight_decay,
                                  grad_scale, maximize, static_cast<double>(samples)};
  Slots all = make_slots(params, grads, &sums, coordinate_sums);
  for (Slot& slot : all.slots) slot.item.lr = lr, slot.item.weight_decay = weight_decay;
  int64_t blocks;
  const std::vector<Tables> tables = make_tables(all.slots, &blocks);
  Tensor grad_norm_sq = new_empty(params[0], {}, ScalarType::Double);
  Tensor results = new_empty(params[0], {coordinates ? 4 : 0}, ScalarType::Double);
  Reductions reductions(params[0], blocks);
  for (const Tables& t : tables) {
    check(launch_adagrad(t.table, t.param, t.grad, options, coordinates, reductions.of(t),
                         launch.stream),
          "adagrad_");
  }
  reductions.reduce(kGradNorm, data<double>(grad_norm_sq));
  if (coordinates) reductions.reduce_coordinates(data<double>(results));
  reductions.run("adagrad_", launch.stream);
  return {grad_norm_sq, results};
}

std::tuple<Tensor, Tensor> adagrad_norm_cuda(const std::vector<Tensor>& params,
                                             const std::vector<Tensor>& grads, const Tensor& sum,
                                             const std::vector<Tensor>& coordinate_sums,
                                             const std::vector<double>& lr, double eps,
                                             const std::vector<double>& weight_decay, bool maximize,
                                             double grad_scale, int64_t samples) {
  STD_TORCH_CHECK(!params.empty(), "adagrad_norm_: no parameters");
  STD_TORCH_CHECK(sum.numel() == 1 && is_double(sum),
                  "adagrad_norm_: sum must be one float64 number");
  STD_TORCH_CHECK(sum.is_cuda() && sum.get_device_index() == params[0].get_device_index(),
                  "adagrad_norm_: sum must be on the parameters' device");
  STD_TORCH_CHECK(lr.size() == params.size() && weight_decay.size() == params.size(),
                  "adagrad_norm_: expected one lr and one weight_decay for each parameter");
  const Launch launch(params[0]);
  const bool coordinates = !coordinate_sums.empty();
  const AdagradOptions options = {0, eps, 0, grad_scale, maximize, static_cast<double>(samples)};
  Slots all = make_slots(params, grads, nullptr, coordinate_sums);
  bool decayed = false;
  for (size_t i = 0; i < params.size(); ++i) {
    all.slots[i].item.lr = lr[i], all.slots[i].item.weight_decay = weight_decay[i];
    decayed = decayed || weight_decay[i] != 0;
  }
  int64_t blocks;
  const std::vector<Tables> tables = make_tables(all.slots, &blocks);
  Tensor grad_norm_sq = new_empty(params[0], {}, ScalarType::Double);
  Tensor results = new_empty(params[0], {coordinates ? 4 : 0}, ScalarType::Double);
  Reductions reductions(params[0], blocks);
  for (const Tables& t : tables) {
    check(launch_adagrad_norm_reduce(t.table, t.param, t.grad, options, decayed, reductions.of(t),
                                     launch.stream),
          "adagrad_norm_");
  }
  reductions.reduce(kGradNorm, data<double>(grad_norm_sq));
  reductions.reduce(decayed ? kDecayedNorm : kGradNorm, data<double>(sum), true);
  reductions.run("adagrad_norm_", launch.stream);
  for (const Tables& t : tables) {
    check(launch_adagrad_norm_update(t.table, t.param, t.grad, options, coordinates,
                                     const_data<double>(sum), reductions.of(t), launch.stream),
          "adagrad_norm_");
  }
  if (coordinates) {
    reductions.reduce_coordinates(data<double>(results));
    reductions.run("adagrad_norm_", launch.stream);
  }
  return {grad_norm_sq, results};
}

Tensor grad_norm_sq_cuda(const std::vector<Tensor>& tensors) {
  STD_TORCH_CHECK(!tensors.empty(), "grad_norm_sq: no tensors");
  const Launch launch(tensors[0]);
  Slots all;
  for (const Tensor& t : tensors) {
    STD_TORCH_CHECK(t.is_cuda() && t.get_device_index() == launch.device,
                    "grad_norm_sq: the tensors must be on one device");
    TensorItem item = {};
    item.grad = all.keep(dense(t) ? t : torch::stable::contiguous(t), t);
    item.numel = t.numel();
    all.slots.push_back({type_of(t), type_of(t), item});
  }
  int64_t blocks;
  const std::vector<Tables> tables = make_tables(all.slots, &blocks);
  Tensor norm_sq = new_empty(tensors[0], {}, ScalarType::Double);
  Reductions reductions(tensors[0], blocks);
  AdagradOptions options = {};
  options.grad_scale = 1;
  for (const Tables& t : tables) {
    check(launch_adagrad_norm_reduce(t.table, t.param, t.grad, options, false, reductions.of(t),
                                     launch.stream),
          "grad_norm_sq");
  }
  reductions.reduce(kGradNorm, data<double>(norm_sq));
  reductions.run("grad_norm_sq", launch.stream);
  return norm_sq;
}

}  // namespace adagrad_kernels
