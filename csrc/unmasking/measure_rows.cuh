// What the operators that measure rows of logits share on the GPU.
#pragma once

#include <optional>

#include "unmasking/logit_arguments.h"
#include "unmasking/logit_outputs.cuh"
#include "unmasking/logit_part.h"
#include "unmasking/masked_tokens.cuh"

namespace winnow {

inline PartLayout layout_of(const LogitArguments& call, bool is_double) {
  return part_layout(call.start, call.rows.length, call.previous.has_value(), is_double);
}

// What is summed over the rows that count, block by block, in the words of the kernels.
struct RowSums {
  Tensor blocks;
  Tensor truncations;  // of each row; empty, as the next, where nothing is truncated
  Tensor kept;
};

RowSums sum_rows(const LogitArguments& call, const Tensor& logits, const Stream& stream);

// Statistics of the rows that count into `out`, and with them the state of a part of a vocabulary
// into `part`.
void measure_rows(const LogitArguments& call, const MaskedTokens& tokens,
                  const std::optional<Tensor>& seed, const Tensor& logits, const LogitOutputs& out,
                  const Stream& stream, const std::optional<Tensor>& part = std::nullopt);

}  // namespace winnow
