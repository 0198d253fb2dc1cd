// The order of the launches that measure rows of logits: two without truncation and divergence. Ids
// and seed stay on the device.
#pragma once

#include <optional>
#include <tuple>

#include "unmasking/logit_arguments.h"
#include "unmasking/logit_rows_kernel.cuh"

namespace winnow {
namespace {

constexpr int64_t kMostVocab = int64_t{1} << 19;  // what masses in fixed point hold

bool reads_vectors(const Rows& rows) {
  const auto bytes = static_cast<int64_t>(rows.tensor.element_size());
  return reinterpret_cast<uintptr_t>(rows.tensor.data_ptr()) % 16 == 0 &&
         (rows.count <= 1 || rows.stride * bytes % 16 == 0);
}

template <typename T, typename Real>
LogitView<T, Real> view_of(const LogitArguments& call, const Rows& rows,
                           const MaskedTokens& tokens) {
  LogitView<T, Real> view = {};
  view.logits = global<const T>(rows.tensor);
  view.stride = rows.stride;
  view.vectors = reads_vectors(rows);
  view.vocab = rows.length;
  if (call.suppressed) {
    view.suppressed = global<const int64_t>(*call.suppressed);
    view.given_count = view.suppressed_count = call.suppressed->numel();
  }
  if (tokens.length > 0 && tokens.mask_id >= 0 && tokens.mask_id < rows.length) {
    ++view.suppressed_count;
  }
  view.tokens = tokens;
  view.shifted = call.shifted;
  if (call.keys) view.keys = global<const int64_t>(*call.keys);
  if (call.mask) view.mask = global<const bool>(*call.mask);
  return view;
}

template <typename T, typename Real>
void launch_rows(const LogitArguments& call, const RowOptions& options, const MaskedTokens& tokens,
                 const RowOutputs<Real>& out, const Tensor& like, const Stream& stream) {
  const Rows& rows = call.rows;
  const int64_t slices = ceil_div<int64_t>(rows.length, kSlice);
  LogitView<T, Real> view = view_of<T, Real>(call, rows, tokens);
  if (call.unconditional) {
    view.unconditional = global<const T>(call.unconditional->tensor);
    view.unconditional_stride = call.unconditional->stride;
    view.vectors = view.vectors && reads_vectors(*call.unconditional);
    view.guidance = static_cast<Real>(call.guidance);
  }
  const auto workspace = [&](int64_t count, size_t bytes) {
    return empty({count, static_cast<int64_t>(bytes / sizeof(double))}, ScalarType::Double, like);
  };
  const Grid every_slice = {rows.count, slices};
  const Grid every_row = {rows.count};
  const int64_t parts = rows.count * slices;

  const Tensor sums = workspace(parts, sizeof(SliceSums));
  const auto slice_sums = global<SliceSums>(sums);
  launch("logit_stats", scan_slices<T, Real>, every_slice, kThreads, stream, view,
         options.temperature, options.draw_temperature, slice_sums);
  const bool truncates = options.truncates;
  const Tensor truncations = workspace(truncates ? rows.count : 0, sizeof(Truncation));
  const Tensor kept = workspace(truncates ? parts : 0, sizeof(Sums));
  const auto kept_sums = global<Sums>(kept);
  if (truncates) {
    launch("logit_stats", truncate_rows<T, Real>, every_row, kThreads, stream, view,
           options.temperature, options.draw_temperature, call.options.top_k, call.options.top_p,
           call.options.reach(), slice_sums, global<Truncation>(truncations), kept_sums);
  }
  launch("logit_stats", finish_rows<T, Real>, every_row, kThreads, stream, view, options,
         slice_sums, global<Truncation>(truncations), kept_sums, out);
  if (!call.previous) return;

  const LogitView<T, Real> previous = view_of<T, Real>(call, *call.previous, tokens);
  const Tensor before = workspace(parts, sizeof(SliceSums));
  const auto previous_sums = global<SliceSums>(before);
  const Tensor cross = workspace(parts, sizeof(double));
  const bool described = truncates && !options.raw;
  launch("logit_stats", scan_slices<T, Real>, every_slice, kThreads, stream, previous,
         options.temperature, options.temperature, previous_sums);
  launch("logit_stats", cross_slices<T, Real>, every_slice, kThreads, stream, view, previous,
         options.temperature, slice_sums, previous_sums,
         described ? global<Truncation>(truncations) : Global<Truncation>(nullptr),
         global<double>(cross));
  launch("logit_stats", diverge_rows<T, Real>, every_row, kThreads, stream, view,
         options.temperature, slice_sums, previous_sums,
         described ? kept_sums : Global<Sums>(nullptr), global<double>(cross), out.kl);
}

// The tensors that logit_stats returns, one entry per row.
struct LogitOutputs {
  Tensor token;
  Tensor argmax;
  Tensor statistic[7];
  bool has_target;
  bool has_previous;

  LogitOutputs(const Tensor& logits, bool target, bool previous)
      : token(empty(leading_shape(logits), ScalarType::Long, logits)),
        argmax(empty(leading_shape(logits), ScalarType::Long, logits)),
        has_target(target),
        has_previous(previous) {
    for (int i = 0; i < 7; ++i) {
      const bool present = i < 5 || (i == 5 ? target : previous);
      statistic[i] =
          empty(present ? leading_shape(logits) : Shape{0}, statistics_dtype(logits), logits);
    }
  }

  template <typename Real>
  RowOutputs<Real> pointers() const {
    RowOutputs<Real> out = {};
    out.token = global<int64_t>(token);
    out.argmax = global<int64_t>(argmax);
    out.log_prob = global<Real>(statistic[0]);
    out.max_prob = global<Real>(statistic[1]);
    out.margin = global<Real>(statistic[2]);
    out.entropy = global<Real>(statistic[3]);
    out.logsumexp = global<Real>(statistic[4]);
    if (has_target) out.target_log_prob = global<Real>(statistic[5]);
    if (has_previous) out.kl = global<Real>(statistic[6]);
    return out;
  }

  std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> tensors()
      const {
    return {token,        statistic[0], argmax,       statistic[1], statistic[2],
            statistic[3], statistic[4], statistic[5], statistic[6]};
  }
};

void measure_rows(const LogitArguments& call, const MaskedTokens& tokens,
                  const std::optional<Tensor>& seed, const Tensor& logits, const LogitOutputs& out,
                  const Stream& stream) {
  WINNOW_CHECK(call.options.top_p == 1.0 || call.rows.length <= kMostVocab,
               "top_p: expected a vocabulary of at most ", kMostVocab, " tokens on the GPU, got ",
               call.rows.length);
  RowOptions options = {};
  options.temperature = call.options.temperature;
  options.draw_temperature = call.options.draw_temperature;
  options.draws = call.options.draws;
  options.truncates = call.options.truncates();
  options.raw = call.options.raw;
  if (seed) options.seed = seed_of(*seed);
  if (call.target) options.target = global<const int64_t>(*call.target);
  dispatch_floating(logits, [&](auto zero) {
    using T = decltype(zero);
    using Real = std::conditional_t<std::is_same_v<T, double>, double, float>;
    launch_rows<T, Real>(call, options, tokens, out.pointers<Real>(), logits, stream);
  });
}

}  // namespace
}  // namespace winnow
