// Argument checks of the operators. An error names the argument, what came and what is accepted; it
// reaches Python as a ValueError, without a C++ file name. Check before any parallel region: an
// exception inside one loses its text.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <sstream>
#include <string>

#include "common/fail.h"

namespace winnow {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

#define WINNOW_CHECK(condition, ...)               \
  do {                                             \
    if (!(condition)) ::winnow::fail(__VA_ARGS__); \
  } while (0)

// "(2, 8, 10, 64)"
template <typename Sizes>
inline std::string shape_text(const Sizes& sizes) {
  std::ostringstream text;
  text << "(";
  for (size_t i = 0; i < sizes.size(); ++i) text << (i ? ", " : "") << sizes[i];
  text << (sizes.size() == 1 ? ",)" : ")");
  return text.str();
}

inline std::string shape_of(const Tensor& tensor) {
  return shape_text(tensor.sizes());
}

inline const char* name_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Half:
      return "float16";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Short:
      return "int16";
    case ScalarType::Char:
      return "int8";
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Bool:
      return "bool";
    case ScalarType::UInt16:
      return "uint16";
    case ScalarType::UInt32:
      return "uint32";
    case ScalarType::UInt64:
      return "uint64";
    case ScalarType::ComplexHalf:
      return "complex32";
    case ScalarType::ComplexFloat:
      return "complex64";
    case ScalarType::ComplexDouble:
      return "complex128";
    case ScalarType::Float8_e5m2:
      return "float8_e5m2";
    case ScalarType::Float8_e4m3fn:
      return "float8_e4m3fn";
    case ScalarType::Float8_e5m2fnuz:
      return "float8_e5m2fnuz";
    case ScalarType::Float8_e4m3fnuz:
      return "float8_e4m3fnuz";
    case ScalarType::Float8_e8m0fnu:
      return "float8_e8m0fnu";
    default:
      return "an unsupported dtype";
  }
}

inline bool is_floating(ScalarType dtype) {
  return dtype == ScalarType::Float || dtype == ScalarType::Double ||
         dtype == ScalarType::BFloat16 || dtype == ScalarType::Half;
}

// PyTorch lets None pass for a tensor.
inline void check_defined(const char* argument, const Tensor& tensor) {
  WINNOW_CHECK(tensor.defined(), argument, ": expected a tensor, got None");
}

inline void check_floating(const char* argument, const Tensor& tensor) {
  check_defined(argument, tensor);
  WINNOW_CHECK(is_floating(tensor.scalar_type()), argument,
               ": expected float32, bfloat16, float16 or float64, got ",
               name_of(tensor.scalar_type()));
}

inline void check_dtype(const char* argument, const Tensor& tensor, ScalarType expected) {
  check_defined(argument, tensor);
  WINNOW_CHECK(tensor.scalar_type() == expected, argument, ": expected ", name_of(expected),
               ", got ", name_of(tensor.scalar_type()));
}

inline void check_dim(const char* argument, const Tensor& tensor, int64_t dim, const char* layout) {
  WINNOW_CHECK(tensor.dim() == dim, argument, ": expected ", layout, ", got shape ",
               shape_of(tensor));
}

// A kernel is picked by all arguments' devices together, and the one picked need not be that of the
// first argument, so each one is checked. (With a meta tensor among them it is the fake kernel,
// which checks by itself: torch_winnow/_fake.py.)
inline void check_cpu(const char* argument, const Tensor& tensor) {
  check_defined(argument, tensor);
  WINNOW_CHECK(tensor.is_cpu(), argument,
               ": expected a CPU tensor like the other arguments, got one on another device");
}

inline void check_last_contiguous(const char* argument, const Tensor& tensor) {
  const int64_t last = tensor.dim() - 1;
  WINNOW_CHECK(
      last < 0 || tensor.size(last) <= 1 || tensor.stride(last) == 1 || tensor.numel() == 0,
      argument, ": the last dimension must be contiguous (stride 1), got stride ",
      last < 0 ? 1 : tensor.stride(last), " with shape ", shape_of(tensor));
}

// The number in a seed tensor.
inline uint64_t host_seed(const Tensor& seed) {
  check_cpu("seed", seed);
  check_dtype("seed", seed, ScalarType::Long);
  check_dim("seed", seed, 0, "one number");
  return static_cast<uint64_t>(*static_cast<const int64_t*>(seed.data_ptr()));
}

}  // namespace winnow
