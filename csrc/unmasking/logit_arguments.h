// The arguments of logit_stats, checked alike on every device.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <cmath>
#include <optional>
#include <vector>

#include "common/checks.h"
#include "common/tensors.h"
#include "unmasking/logit_part.h"

namespace winnow {

// As they come in.
struct LogitRequest {
  const Tensor& logits;
  const std::optional<Tensor>& mask;
  double temperature;
  const std::optional<Tensor>& suppress_ids;
  const std::optional<Tensor>& target_ids;
  const std::optional<Tensor>& previous_logits;
  const std::optional<Tensor>& unconditional_logits;
  double cfg_scale;
  const std::optional<int64_t>& top_k;
  const std::optional<double>& top_p;
  const std::optional<double>& min_p;
  const std::optional<Tensor>& seed;
  bool raw;
  const std::optional<int64_t>& vocab_start;
  bool shift;
  const std::optional<Tensor>& row_keys;
};

struct LogitOptions {
  double temperature;       // of the statistics
  double draw_temperature;  // of the token; differs from the above for raw statistics only
  bool draws;               // else the token is the argmax
  bool raw;                 // statistics come before truncation
  int64_t top_k;            // 0: all
  double top_p;             // 1: all
  double min_p;             // 0: all

  bool truncates() const { return top_k > 0 || top_p < 1.0 || min_p > 0.0; }
  // How far below the largest logit min_p cuts: not at all, -infinity.
  double reach() const { return draw_temperature * std::log(min_p); }
};

inline LogitOptions logit_options(double temperature, bool seeded, bool raw) {
  LogitOptions options = {};
  options.raw = raw;
  options.draws = seeded && temperature > 0.0;
  options.draw_temperature = temperature > 0.0 ? temperature : 1.0;
  options.temperature = raw ? 1.0 : options.draw_temperature;
  options.top_p = 1.0;
  // Nothing describes the processed distribution then.
  if (raw && !options.draws) options.draw_temperature = 1.0;
  return options;
}

struct LogitArguments {
  Rows rows;
  std::optional<Rows> unconditional;
  std::optional<Rows> previous;
  std::optional<Tensor> mask;        // these contiguous
  std::optional<Tensor> suppressed;  // ids as given
  std::optional<Tensor> target;
  std::optional<Tensor> keys;  // of the draws; else a row's index
  double guidance;             // cfg_scale + 1
  LogitOptions options;
  bool is_part;  // of a vocabulary, from `start` on
  int64_t start;
  int64_t shifted;  // length of the sequences whose logits come one position early; 0: none

  // Where the logits of a row are.
  int64_t source(int64_t row) const { return shifted > 0 && row % shifted > 0 ? row - 1 : row; }
};

constexpr int64_t kMostPart = int64_t{1} << 24;   // a float holds each index
constexpr int64_t kMostStart = int64_t{1} << 62;  // and a sum with it does not overflow

template <typename OnDevice>
std::optional<Tensor> one_per_row(const char* argument, const std::optional<Tensor>& tensor,
                                  const Tensor& logits, ScalarType dtype,
                                  const OnDevice& check_device) {
  if (!tensor) return std::nullopt;
  check_device(argument, *tensor);
  check_dtype(argument, *tensor, dtype);
  WINNOW_CHECK(shape(*tensor) == leading_shape(logits), argument,
               ": expected one for each row of logits, whose shape is ", shape_of(logits), ", got ",
               shape_of(*tensor));
  return dense(*tensor);
}

template <typename OnDevice>
std::optional<Rows> rows_like(const char* argument, const std::optional<Tensor>& tensor,
                              const Tensor& logits, const OnDevice& check_device) {
  if (!tensor) return std::nullopt;
  check_device(argument, *tensor);
  check_dtype(argument, *tensor, logits.scalar_type());
  WINNOW_CHECK(shape(*tensor) == shape(logits), argument, ": expected the shape of logits, ",
               shape_of(logits), ", got ", shape_of(*tensor));
  return as_rows(*tensor);
}

// `check_device(name, tensor)` refuses a tensor that is elsewhere.
template <typename OnDevice>
LogitArguments check_logit_arguments(const LogitRequest& call, const OnDevice& check_device) {
  const Tensor& logits = call.logits;
  check_device("logits", logits);
  check_floating("logits", logits);
  WINNOW_CHECK(logits.dim() >= 1, "logits: expected (..., V), got a scalar");
  WINNOW_CHECK(std::isfinite(call.temperature) && call.temperature >= 0.0,
               "temperature: expected a finite number >= 0, got ", call.temperature);
  WINNOW_CHECK(std::isfinite(call.cfg_scale), "cfg_scale: expected a finite number, got ",
               call.cfg_scale);
  WINNOW_CHECK(!call.top_k || *call.top_k >= 1, "top_k: expected at least 1, got ",
               call.top_k.value_or(1));
  WINNOW_CHECK(!call.top_p || (*call.top_p > 0.0 && *call.top_p <= 1.0),
               "top_p: expected a number in (0, 1], got ", call.top_p.value_or(1.0));
  WINNOW_CHECK(!call.min_p || (*call.min_p >= 0.0 && *call.min_p <= 1.0),
               "min_p: expected a number in [0, 1], got ", call.min_p.value_or(0.0));

  LogitArguments checked = {};
  checked.rows = as_rows(logits);
  if (call.shift) {
    WINNOW_CHECK(logits.dim() >= 2, "logits: expected (..., L, V) with shift, got ",
                 shape_of(logits));
    checked.shifted = logits.size(logits.dim() - 2);
  }
  if (call.vocab_start) {
    const char* truncating = call.top_k                         ? "top_k"
                             : call.top_p && *call.top_p != 1.0 ? "top_p"
                             : call.min_p && *call.min_p != 0.0 ? "min_p"
                                                                : nullptr;
    WINNOW_CHECK(truncating == nullptr, truncating,
                 ": expected None with vocab_start, because which logits of a part are kept "
                 "depends on the other parts");
    WINNOW_CHECK(*call.vocab_start >= 0 && *call.vocab_start <= kMostStart,
                 "vocab_start: expected 0 to 2^62, got ", *call.vocab_start);
    WINNOW_CHECK(checked.rows.length <= kMostPart, "logits: expected a part of at most ", kMostPart,
                 " tokens with vocab_start, got ", checked.rows.length);
    checked.is_part = true;
    checked.start = *call.vocab_start;
  }
  if (call.suppress_ids) {
    check_device("suppress_ids", *call.suppress_ids);
    check_dtype("suppress_ids", *call.suppress_ids, ScalarType::Long);
    check_dim("suppress_ids", *call.suppress_ids, 1, "(n,)");
    checked.suppressed = dense(*call.suppress_ids);
  }
  checked.previous = rows_like("previous_logits", call.previous_logits, logits, check_device);
  checked.unconditional =
      rows_like("unconditional_logits", call.unconditional_logits, logits, check_device);
  checked.mask = one_per_row("mask", call.mask, logits, ScalarType::Bool, check_device);
  checked.target =
      one_per_row("target_ids", call.target_ids, logits, ScalarType::Long, check_device);
  checked.keys = one_per_row("row_keys", call.row_keys, logits, ScalarType::Long, check_device);
  checked.guidance = call.cfg_scale + 1.0;
  LogitOptions& options = checked.options;
  options = logit_options(call.temperature, call.seed.has_value(), call.raw);
  if (!options.raw || options.draws) {
    options.top_k = call.top_k && *call.top_k < checked.rows.length ? *call.top_k : 0;
    options.top_p = call.top_p.value_or(1.0);
    options.min_p = call.min_p.value_or(0.0);
  }
  return checked;
}

// Parts as logit_stats returned them: adjoining, of the same rows.
template <typename OnDevice>
void check_parts(const std::vector<Tensor>& parts, const std::vector<int64_t>& starts,
                 const std::vector<int64_t>& counts, bool has_previous,
                 const OnDevice& check_device) {
  WINNOW_CHECK(!parts.empty() && starts.size() == parts.size() && counts.size() == parts.size(),
               "parts: expected at least one, with a start and a count for each, got ",
               parts.size(), ", ", starts.size(), " and ", counts.size());
  for (size_t p = 0; p < parts.size(); ++p) {
    const Tensor& part = parts[p];
    check_device("parts", part);
    const ScalarType dtype = part.scalar_type();
    WINNOW_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double,
                 "parts: expected float32 or float64, got ", name_of(dtype));
    check_dtype("parts", part, parts.front().scalar_type());
    WINNOW_CHECK(part.dim() >= 1 && leading_shape(part) == leading_shape(parts.front()),
                 "parts: expected the same rows in all of them, got ", shape_of(parts.front()),
                 " and ", shape_of(part));
    WINNOW_CHECK(starts[p] >= 0 && starts[p] <= kMostStart,
                 "starts: expected 0 to 2^62 in all of them, got ", starts[p]);
    WINNOW_CHECK(counts[p] >= 0 && counts[p] <= kMostPart, "counts: expected 0 to ", kMostPart,
                 " in all of them, got ", counts[p]);
    WINNOW_CHECK(
        p == 0 || starts[p] == starts[p - 1] + counts[p - 1],
        "parts: expected adjoining parts of the vocabulary in order, got one that ends at ",
        p == 0 ? 0 : starts[p - 1] + counts[p - 1], " before one that starts at ", starts[p]);
    const int64_t words =
        part_layout(starts[p], counts[p], has_previous, dtype == ScalarType::Double).words();
    WINNOW_CHECK(part.size(part.dim() - 1) == words, "parts: expected (..., ", words,
                 ") for tokens ", starts[p], " to ", starts[p] + counts[p], ", got ",
                 shape_of(part));
  }
}

}  // namespace winnow
