// Helpers of the ops on torch's stable ABI, the same for every device.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <vector>

namespace adagrad_kernels {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline bool is_double(const Tensor& t) { return t.scalar_type() == ScalarType::Double; }

inline bool is_low_precision(const Tensor& t) {
  return t.scalar_type() == ScalarType::BFloat16 || t.scalar_type() == ScalarType::Half;
}

// float64 for float64, float32 for everything lower.
inline ScalarType compute_type(const Tensor& t) {
  const ScalarType type = t.scalar_type();
  if (type == ScalarType::Float || type == ScalarType::Double) return type;
  STD_TORCH_CHECK(is_low_precision(t), "adagrad_kernels: expected a floating point tensor");
  return ScalarType::Float;
}

// float32 or float64 as it is, bfloat16 and float16 as a float32 copy.
inline Tensor as_compute(const Tensor& t) {
  const ScalarType type = compute_type(t);
  return t.scalar_type() == type ? t : torch::stable::to(t, type);
}

// torch's ops are looked up by name in every call, most of a microsecond: what needs none is not
// asked of them.
inline Tensor as_contiguous(const Tensor& t) {
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

inline Tensor converted(const Tensor& t, ScalarType type) {
  return t.scalar_type() == type ? t : torch::stable::to(t, type);
}

// Not initialised, with the dtype and device of another one.
inline Tensor allocate(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef sizes) {
  bool empty = false;
  for (const int64_t size : sizes) empty = empty || size == 0;
  if (!empty) return torch::stable::new_empty(like, sizes);
  const std::vector<int64_t> strides(sizes.size(), 1);
  int32_t dtype, device_type, device_index;
  AtenTensorHandle made;
  // The macro that checks these results is named otherwise in torch 2.11.
  const bool found =
      aoti_torch_get_dtype(like.get(), &dtype) == 0 &&
      aoti_torch_get_device_type(like.get(), &device_type) == 0 &&
      aoti_torch_get_device_index(like.get(), &device_index) == 0 &&
      aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
                               dtype, device_type, device_index, &made) == 0;
  STD_TORCH_CHECK(found, "adagrad_kernels: no tensor could be made");
  return Tensor(made);
}

template <class T>
T* data(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}
template <class T>
const T* const_data(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Whether an element has the same offset in both; the shapes must be the same.
inline bool same_layout(const Tensor& a, const Tensor& b) {
  const auto x = a.strides(), y = b.strides();
  if (x.size() != y.size()) return false;
  for (size_t d = 0; d < x.size(); ++d) {
    if (a.size(d) != b.size(d)) return false;
    if (a.size(d) > 1 && x[d] != y[d]) return false;
  }
  return true;
}

// Whether the elements fill a run of memory without gaps or overlaps, in any order of dimensions.
inline bool dense(const Tensor& t) {
  const int64_t numel = t.numel();
  int64_t run = 1;  // elements covered by the dimensions found so far, the fastest first
  for (bool grows = true; grows && run < numel;) {
    grows = false;
    for (int64_t d = 0; d < t.dim(); ++d) {
      if (t.size(d) == 1 || t.stride(d) != run) continue;
      run *= t.size(d);
      grows = true;
    }
  }
  return run == numel || numel == 0;
}

// t laid out as the model, copied only if it is not; of the given type.
inline Tensor laid_out_as(const Tensor& t, const Tensor& model, ScalarType type, const char* what,
                          size_t index) {
  bool shapes = t.dim() == model.dim();
  for (int64_t d = 0; shapes && d < t.dim(); ++d) shapes = t.size(d) == model.size(d);
  STD_TORCH_CHECK(shapes, "adagrad: the shape of ", what, " ", index,
                  " is not that of its parameter");
  const Tensor same = converted(t, type);
  if (same_layout(same, model)) return same;
  Tensor copy = torch::stable::empty_like(converted(model, type));
  torch::stable::copy_(copy, same);
  return copy;
}

}  // namespace adagrad_kernels
