// What the CPU and the GPU check of soft_embedding's arguments.
#pragma once

#include <cmath>
#include <optional>

#include "common/checks.h"
#include "common/tensors.h"

namespace winnow {

// How much of the nucleus is mixed in, Eq. 4 of arXiv 2510.11052; `most` is log V, the largest
// entropy that there is. A single token has none. constexpr, so that kernels may call it.
constexpr double mixing_share(double mix, double entropy, double most) {
  const double certainty = most > 0.0 ? 1.0 - entropy / most : 1.0;
  return mix * (certainty < 0.0 ? 0.0 : certainty > 1.0 ? 1.0 : certainty);
}

inline void check_soft_embedding(const Tensor& logits, const Tensor& embedding,
                                 const Tensor& mask_embedding, const std::optional<Tensor>& mask,
                                 double temperature, const std::optional<int64_t>& top_k,
                                 const std::optional<double>& top_p, double mix) {
  check_floating("logits", logits);
  WINNOW_CHECK(logits.dim() >= 1, "logits: expected (..., V), got a scalar");
  check_floating("embedding", embedding);
  check_dim("embedding", embedding, 2, "(V, E)");
  const int64_t vocab = logits.size(logits.dim() - 1);
  WINNOW_CHECK(embedding.size(0) >= vocab, "embedding: expected at least V=", vocab,
               " rows as in logits, got ", shape_of(embedding));
  check_last_contiguous("embedding", embedding);
  WINNOW_CHECK((logits.scalar_type() == ScalarType::Double) ==
                   (embedding.scalar_type() == ScalarType::Double),
               "embedding: expected float64 exactly where logits are, got ",
               name_of(embedding.scalar_type()), " with ", name_of(logits.scalar_type()));
  check_dtype("mask_embedding", mask_embedding, embedding.scalar_type());
  WINNOW_CHECK(shape(mask_embedding) == Shape{embedding.size(1)}, "mask_embedding: expected (E,) ",
               "with E=", embedding.size(1), " as in embedding, got ", shape_of(mask_embedding));
  check_last_contiguous("mask_embedding", mask_embedding);
  if (mask) {
    check_dtype("mask", *mask, ScalarType::Bool);
    WINNOW_CHECK(shape(*mask) == leading_shape(logits),
                 "mask: expected one for each row of logits, whose shape is ", shape_of(logits),
                 ", got ", shape_of(*mask));
  }
  WINNOW_CHECK(std::isfinite(temperature) && temperature >= 0.0,
               "temperature: expected a finite number >= 0, got ", temperature);
  WINNOW_CHECK(!top_k || *top_k >= 1, "top_k: expected at least 1, got ", top_k.value_or(1));
  WINNOW_CHECK(!top_p || (*top_p > 0.0 && *top_p <= 1.0),
               "top_p: expected a number in (0, 1], got ", top_p.value_or(1.0));
  WINNOW_CHECK(mix >= 0.0 && mix <= 1.0, "mix: expected a number in [0, 1], got ", mix);
}

}  // namespace winnow
