// Allocation and dtype dispatch for the operators, on top of the stable ABI.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <iomanip>
#include <vector>

#include "common/checks.h"
#include "common/element_type.h"

namespace winnow {

using Shape = std::vector<int64_t>;

inline Shape shape(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  return Shape(sizes.begin(), sizes.end());
}

// The shape without its last `n` dimensions.
inline Shape leading_shape(const Tensor& tensor, int64_t n = 1) {
  Shape sizes = shape(tensor);
  sizes.resize(sizes.size() - static_cast<size_t>(n));
  return sizes;
}

inline int64_t product(const Shape& sizes) {
  int64_t count = 1;
  for (const int64_t size : sizes) count *= size;
  return count;
}

// The stable ABI tells that an allocation failed but not why; in practice it is memory. The wording
// " out of memory." is what training loops search for to retry with a smaller batch.
[[noreturn]] inline void fail_allocation(const Shape& sizes, ScalarType dtype, const Tensor& like) {
  double bytes = static_cast<double>(aoti_torch_dtype_element_size(
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype))));
  for (const int64_t size : sizes) bytes *= static_cast<double>(size);
  std::ostringstream text;
  text << (like.is_cpu() ? "CPU" : "CUDA")
       << " out of memory. An operator of torch-winnow asked for " << std::fixed
       << std::setprecision(2) << bytes / (1 << 30) << " GiB, a " << name_of(dtype)
       << " tensor of shape " << shape_text(sizes)
       << ". Use a smaller batch or shorter sequences, or free tensors that are no longer needed.";
  if (!like.is_cpu()) text << " (If memory is free, an earlier kernel failed: synchronise to see.)";
  throw std::runtime_error(text.str());
}

// Uninitialised and contiguous, on the device of `like`. One C call: the dispatcher's `empty` costs
// three times as much, which shows in ops of a few microseconds.
inline Tensor empty(const Shape& sizes, ScalarType dtype, const Tensor& like) {
  Shape strides(sizes.size());
  int64_t step = 1;
  for (size_t i = sizes.size(); i-- > 0;) {
    strides[i] = step;
    if (__builtin_mul_overflow(step, sizes[i] > 0 ? sizes[i] : 1, &step)) {
      fail_allocation(sizes, dtype, like);
    }
  }
  int32_t device_type = 0;
  int32_t device_index = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  AtenTensorHandle handle = nullptr;
  const auto error = aoti_torch_empty_strided(
      static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)), device_type,
      device_index, &handle);
  if (error != TORCH_SUCCESS) fail_allocation(sizes, dtype, like);
  return Tensor(handle);
}

// The tensor itself where it is contiguous, else a copy.
inline Tensor dense(const Tensor& tensor) {
  if (tensor.is_contiguous()) return tensor;
  Tensor copy = empty(shape(tensor), tensor.scalar_type(), tensor);
  torch::stable::copy_(copy, tensor);
  return copy;
}

// Statistics are float32, or float64 for float64 inputs.
inline ScalarType statistics_dtype(const Tensor& input) {
  return input.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// The element type that *_simd.cc loops are told, for a tensor that passed check_floating.
inline ElementType element_type(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return ElementType::kFloat;
    case ScalarType::Double:
      return ElementType::kDouble;
    case ScalarType::BFloat16:
      return ElementType::kBFloat16;
    case ScalarType::Half:
      return ElementType::kHalf;
    default:
      fail("expected a floating dtype, got ", name_of(tensor.scalar_type()));
  }
}

// Rows of the last dimension as one strided list, without copying where the leading dimensions
// allow it (row r starts at r * stride); otherwise a contiguous copy.
struct Rows {
  Tensor tensor;  // keeps the memory alive
  int64_t count;
  int64_t length;
  int64_t stride;
};

inline Rows as_rows(const Tensor& tensor) {
  const int64_t last = tensor.dim() - 1;
  const int64_t length = tensor.size(last);
  const int64_t count = length == 0 ? product(leading_shape(tensor)) : tensor.numel() / length;
  bool regular = length <= 1 || tensor.stride(last) == 1;
  int64_t stride = 0;  // distance of neighbouring rows, once a dimension of more than one fixes it
  int64_t expected = -1;  // stride of the next dimension outwards; an expanded one may have 0
  for (int64_t d = last - 1; d >= 0 && regular; --d) {
    if (tensor.size(d) == 1) continue;
    if (expected < 0) {
      stride = tensor.stride(d);
      regular = stride >= 0;
    } else {
      regular = tensor.stride(d) == expected;
    }
    expected = tensor.stride(d) * tensor.size(d);
  }
  if (regular) return {tensor, count, length, stride};
  return {dense(tensor), count, length, length};
}

}  // namespace winnow
