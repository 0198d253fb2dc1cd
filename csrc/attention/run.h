// What each device does with an attention problem once its arguments are checked: run.cpp for the
// CPU, run.cu for the GPU. The operators themselves (cat_attention.h and the like) are the same.
#pragma once

#include <optional>
#include <tuple>

#include "attention/problem.h"
#include "common/checks.h"

namespace winnow {

// The tensors that a problem's pointers point into.
struct Operands {
  Tensor query, key, value;
  std::optional<Tensor> slot_key, slot_value;  // where the pattern has slots of its own
  std::optional<Tensor> sequences;             // what read_sequences returned
};

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

void check_operand_device(const char* argument, const Tensor& tensor);

// int64 (2, S + 1): where each sequence's rows and its slots begin. cu_seqlens has S + 1 integers.
Tensor read_sequences(const Tensor& cu_seqlens, const Pattern& options);

// (out, lse)
std::tuple<Tensor, Tensor> run_forward(const AttentionProblem& problem, const Operands& operands);

InputGradients run_backward(const AttentionProblem& problem, const Operands& operands,
                            const Gradients& gradients);

}  // namespace winnow
