// Forward and backward of any pattern, once the arguments are checked.
#pragma once

#include <optional>
#include <tuple>

#include "attention/problem.h"
#include "common/checks.h"

namespace winnow {

// (out, lse)
std::tuple<Tensor, Tensor> run_forward(const AttentionProblem& problem, const Tensor& query);

// What a backward operator receives besides the forward's inputs.
struct Gradients {
  const Tensor& grad_out;
  const Tensor& grad_lse;
  const Tensor& out;
  const Tensor& lse;
};

// Gradients of query, key, value, and of the slots where the pattern has slots of its own.
struct InputGradients {
  Tensor query, key, value;
  std::optional<Tensor> slot_key, slot_value;
};

InputGradients run_backward(const AttentionProblem& problem, const Gradients& gradients,
                            const Tensor& query, const Tensor& key,
                            const std::optional<Tensor>& slot_key);

}  // namespace winnow
