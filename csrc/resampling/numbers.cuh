// Floating numbers whose dtype is known when a kernel runs. Populations are read a few times only,
// and one kernel for all dtypes takes a quarter of the time to compile.
#pragma once

#include "common/device.h"

namespace winnow {
namespace {

// What is read; one of the pointers is set.
struct Numbers {
  Global<const float> single;
  Global<const double> wide;
  Global<const c10::BFloat16> brain;
  Global<const c10::Half> half;

  WINNOW_DEVICE double operator[](int64_t i) const {
    if (single) {
      const float x = single[i];
      return static_cast<double>(x);
    }
    if (wide) {
      const double x = wide[i];
      return x;
    }
    if (brain) {
      const c10::BFloat16 x = brain[i];
      return static_cast<double>(static_cast<float>(x));
    }
    const c10::Half x = half[i];
    return static_cast<double>(static_cast<float>(x));
  }
};

// What statistics_dtype says: float, or double.
struct Reals {
  Global<float> narrow;  // null: wide
  Global<double> wide;

  WINNOW_DEVICE double operator[](int64_t i) const {
    if (narrow) {
      const float x = narrow[i];
      return static_cast<double>(x);
    }
    const double x = wide[i];
    return x;
  }
  WINNOW_DEVICE void store(int64_t i, double x) const {
    if (narrow) {
      narrow[i] = static_cast<float>(x);
    } else {
      wide[i] = x;
    }
  }
};

inline Numbers numbers(const Tensor& tensor) {
  Numbers result = {};
  dispatch_floating(tensor, [&](auto zero) {
    using T = decltype(zero);
    const auto pointer = global<const T>(tensor);
    if constexpr (std::is_same_v<T, float>) {
      result.single = pointer;
    } else if constexpr (std::is_same_v<T, double>) {
      result.wide = pointer;
    } else if constexpr (std::is_same_v<T, c10::BFloat16>) {
      result.brain = pointer;
    } else {
      result.half = pointer;
    }
  });
  return result;
}

inline Reals reals(const Tensor& tensor) {
  Reals result = {};
  if (tensor.scalar_type() == ScalarType::Double) {
    result.wide = global<double>(tensor);
  } else {
    result.narrow = global<float>(tensor);
  }
  return result;
}

}  // namespace
}  // namespace winnow
