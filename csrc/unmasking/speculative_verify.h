// What the CPU and the GPU check of speculative_verify's arguments, and the sizes that follow.
#pragma once

#include <cmath>
#include <optional>

#include "common/checks.h"
#include "common/tensors.h"

namespace winnow {

struct VerificationShape {
  int64_t batch;
  int64_t steps;    // rows of the target that a batch row may need, one after another
  int64_t places;   // rows of the target per batch row
  int64_t drafts;   // drafted tokens per batch row
  int64_t drafted;  // steps that have a draft, at most
};

inline VerificationShape check_verification(const Tensor& draft_tokens,
                                            const std::optional<Tensor>& draft_logits,
                                            const Tensor& target_logits, double temperature,
                                            const std::optional<Tensor>& lengths,
                                            const std::optional<Tensor>& order,
                                            const std::optional<Tensor>& seed) {
  check_floating("target_logits", target_logits);
  check_dim("target_logits", target_logits, 3, order ? "(B, L, V)" : "(B, T + 1, V)");
  check_dtype("draft_tokens", draft_tokens, ScalarType::Long);
  check_dim("draft_tokens", draft_tokens, 2, order ? "(B, L)" : "(B, T)");
  const int64_t batch = target_logits.size(0);
  const int64_t places = target_logits.size(1);
  const int64_t drafts = draft_tokens.size(1);
  WINNOW_CHECK(draft_tokens.size(0) == batch, "draft_tokens: expected B=", batch,
               " as in target_logits, got ", shape_of(draft_tokens));
  WINNOW_CHECK(places == drafts || (!order && places == drafts + 1), "target_logits: expected ",
               order ? "one row for each of the " : "one row for each draft, or one more, of the ",
               drafts, " draft_tokens, got ", shape_of(target_logits));
  if (draft_logits) {
    check_dtype("draft_logits", *draft_logits, target_logits.scalar_type());
    const Shape expected = {batch, drafts, target_logits.size(2)};
    WINNOW_CHECK(shape(*draft_logits) == expected, "draft_logits: expected (", batch, ", ", drafts,
                 ", ", expected[2], ") like draft_tokens and target_logits, got ",
                 shape_of(*draft_logits));
  }
  WINNOW_CHECK(std::isfinite(temperature) && temperature >= 0.0,
               "temperature: expected a finite number >= 0, got ", temperature);
  if (lengths) {
    check_dtype("lengths", *lengths, ScalarType::Long);
    WINNOW_CHECK(shape(*lengths) == Shape{batch}, "lengths: expected (B,) with B=", batch, ", got ",
                 shape_of(*lengths));
  }
  if (order) {
    check_dtype("order", *order, ScalarType::Long);
    check_dim("order", *order, 2, "(B, S)");
    WINNOW_CHECK(order->size(0) == batch, "order: expected (B, S) with B=", batch, ", got ",
                 shape_of(*order));
  }
  if (seed) {
    check_dtype("seed", *seed, ScalarType::Long);
    check_dim("seed", *seed, 0, "one number");
  }
  WINNOW_CHECK(seed || temperature == 0.0, "seed: expected one where temperature > 0, got None");
  const int64_t steps = order ? order->size(1) : places;
  return {batch, steps, places, drafts, order ? steps : drafts};
}

}  // namespace winnow
