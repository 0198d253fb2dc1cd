// The arguments of a choice of positions, checked alike on every device.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <optional>

#include "common/checks.h"
#include "common/tensors.h"
#include "unmasking/selection_rule.h"

namespace winnow {

inline Rule make_rule(int64_t order, int64_t criterion, double threshold, int64_t limit) {
  WINNOW_CHECK(order >= kLowestFirst && order <= kRandom, "order: expected 0 to 3, got ", order);
  WINNOW_CHECK(criterion >= kBelow && criterion <= kAny, "criterion: expected 0 to 4, got ",
               criterion);
  WINNOW_CHECK(limit >= -1, "limit: expected at least -1, got ", limit);
  return {static_cast<Order>(order), static_cast<Criterion>(criterion), threshold, limit};
}

// int64 numbers of the given shape, contiguous. `layout` says what B is, `like` where it comes
// from.
template <typename OnDevice>
std::optional<Tensor> check_integers(const char* argument, const std::optional<Tensor>& tensor,
                                     const Shape& sizes, const char* layout, const char* like,
                                     const OnDevice& check_device) {
  if (!tensor) return std::nullopt;
  check_device(argument, *tensor);
  check_dtype(argument, *tensor, ScalarType::Long);
  WINNOW_CHECK(shape(*tensor) == sizes, argument, ": expected ", layout,
               sizes.empty() ? "" : " with B=", sizes.empty() ? "" : std::to_string(sizes[0]),
               sizes.empty() ? "" : like, ", got ", shape_of(*tensor));
  return dense(*tensor);
}

template <typename OnDevice>
std::optional<Tensor> check_window(const std::optional<Tensor>& window, int64_t batch,
                                   const char* like, const OnDevice& check_device) {
  return check_integers("window", window, {batch, 2}, "(B, 2)", like, check_device);
}

struct SelectionArguments {
  Tensor score;
  Tensor mask;
  std::optional<Tensor> window;
  std::optional<Tensor> at_least;
};

template <typename OnDevice>
SelectionArguments check_selection(const Tensor& score, const Tensor& mask,
                                   const std::optional<Tensor>& window,
                                   const std::optional<Tensor>& at_least,
                                   const OnDevice& check_device) {
  check_device("score", score);
  check_dim("score", score, 2, "(B, L)");
  const ScalarType dtype = score.scalar_type();
  WINNOW_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double,
               "score: expected float32 or float64, got ", name_of(dtype));
  check_device("mask", mask);
  check_dtype("mask", mask, ScalarType::Bool);
  WINNOW_CHECK(shape(mask) == shape(score), "mask: expected the shape of score, ", shape_of(score),
               ", got ", shape_of(mask));
  const int64_t batch = score.size(0);
  return {dense(score), dense(mask), check_window(window, batch, " as in score", check_device),
          check_integers("at_least", at_least, {batch}, "(B,)", " as in score", check_device)};
}

}  // namespace winnow
