// The arguments of unmask_step_ that logit_stats does not have, checked alike on every device.
#pragma once

#include <algorithm>
#include <optional>
#include <utility>

#include "unmasking/logit_arguments.h"
#include "unmasking/selection_arguments.h"

namespace winnow {

// Numbered as in torch_winnow/_unmasking/step.py.
enum StepScore : int64_t { kEntropy, kConfidence, kMargin };

struct StepArguments {
  Tensor tokens;
  std::optional<Tensor> mask;
  std::optional<Tensor> window;
  int64_t batch;
  int64_t length;

  // For the CPU.
  std::pair<int64_t, int64_t> bounds(int64_t b) const {
    if (!window) return {0, length};
    const auto* bound = static_cast<const int64_t*>(window->data_ptr()) + 2 * b;
    return {std::max<int64_t>(bound[0], 0), std::min(bound[1], length)};
  }
  int64_t token(int64_t b, int64_t l) const {
    const int64_t at = b * tokens.stride(0) + l * tokens.stride(1);
    return tokens.scalar_type() == ScalarType::Int
               ? static_cast<const int32_t*>(tokens.data_ptr())[at]
               : static_cast<const int64_t*>(tokens.data_ptr())[at];
  }
  void write(int64_t b, int64_t l, int64_t value) const {
    const int64_t at = b * tokens.stride(0) + l * tokens.stride(1);
    if (tokens.scalar_type() == ScalarType::Int) {
      static_cast<int32_t*>(tokens.data_ptr())[at] = static_cast<int32_t>(value);
    } else {
      static_cast<int64_t*>(tokens.data_ptr())[at] = value;
    }
  }
};

template <typename OnDevice>
StepArguments check_step(const Tensor& tokens, const Tensor& logits,
                         const std::optional<Tensor>& mask, const std::optional<Tensor>& window,
                         const OnDevice& check_device) {
  check_device("tokens", tokens);
  const ScalarType dtype = tokens.scalar_type();
  WINNOW_CHECK(tokens.dim() == 2 && (dtype == ScalarType::Long || dtype == ScalarType::Int),
               "tokens: expected (B, L) int64 or int32, got ", shape_of(tokens), " ",
               name_of(dtype));
  WINNOW_CHECK(logits.dim() == 3 && leading_shape(logits) == shape(tokens),
               "logits: expected (B, L, V) with (B, L) = ", shape_of(tokens), " as in tokens, got ",
               shape_of(logits));
  StepArguments checked = {tokens, {}, {}, tokens.size(0), tokens.size(1)};
  if (mask) {
    check_device("mask", *mask);
    WINNOW_CHECK(mask->scalar_type() == ScalarType::Bool && shape(*mask) == shape(tokens),
                 "mask: expected ", shape_of(tokens), " bool as in tokens, got ", shape_of(*mask),
                 " ", name_of(mask->scalar_type()));
    checked.mask = dense(*mask);
  }
  checked.window = check_window(window, checked.batch, " as in tokens", check_device);
  return checked;
}

}  // namespace winnow
