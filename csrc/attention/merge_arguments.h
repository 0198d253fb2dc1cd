// Arguments of winnow::merge_attention, checked alike on every device.
#pragma once

#include <string>
#include <tuple>
#include <vector>

#include "attention/run.h"
#include "common/checks.h"
#include "common/tensors.h"

namespace winnow {

inline void check_parts(const std::vector<Tensor>& outs, const std::vector<Tensor>& lses) {
  WINNOW_CHECK(!outs.empty(), "outs: expected at least one partial result, got none");
  WINNOW_CHECK(lses.size() == outs.size(), "lses: expected ", outs.size(),
               " tensors, one for each of outs, got ", lses.size());
  const Tensor& first = outs[0];
  check_floating("outs[0]", first);
  WINNOW_CHECK(first.dim() >= 2, "outs[0]: expected (..., N, D), got shape ", shape_of(first));
  for (size_t i = 0; i < outs.size(); ++i) {
    const std::string out_name = "outs[" + std::to_string(i) + "]";
    const std::string lse_name = "lses[" + std::to_string(i) + "]";
    check_operand_device(out_name.c_str(), outs[i]);
    check_operand_device(lse_name.c_str(), lses[i]);
    check_dtype(out_name.c_str(), outs[i], first.scalar_type());
    check_dtype(lse_name.c_str(), lses[i], statistics_dtype(first));
    WINNOW_CHECK(shape(outs[i]) == shape(first), out_name, ": expected the shape of outs[0], ",
                 shape_of(first), ", got ", shape_of(outs[i]));
    WINNOW_CHECK(shape(lses[i]) == leading_shape(first), lse_name,
                 ": expected the shape of outs[0] without its last dimension, ", shape_of(first),
                 ", got ", shape_of(lses[i]));
  }
}

inline void check_merged(const Tensor& grad_out, const Tensor& grad_lse,
                         const std::vector<Tensor>& outs, const std::vector<Tensor>& lses,
                         const Tensor& out, const Tensor& lse) {
  check_dtype("grad_out", grad_out, outs[0].scalar_type());
  check_dtype("grad_lse", grad_lse, statistics_dtype(outs[0]));
  check_dtype("out", out, outs[0].scalar_type());
  check_dtype("lse", lse, statistics_dtype(outs[0]));
  for (const auto& [name, tensor, like] : {std::tuple{"grad_out", &grad_out, &outs[0]},
                                           {"grad_lse", &grad_lse, &lses[0]},
                                           {"out", &out, &outs[0]},
                                           {"lse", &lse, &lses[0]}}) {
    WINNOW_CHECK(shape(*tensor) == shape(*like), name, ": expected shape ", shape_of(*like),
                 ", got ", shape_of(*tensor));
  }
}

// One for each of `parts`, stacked along a new first dimension; not initialised.
inline Tensor stacked(const Tensor& like, size_t parts) {
  Shape sizes = shape(like);
  sizes.insert(sizes.begin(), static_cast<int64_t>(parts));
  return empty(sizes, like.scalar_type(), like);
}

}  // namespace winnow
