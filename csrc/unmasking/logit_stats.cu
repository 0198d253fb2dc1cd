// winnow::logit_stats on the GPU. Its kernels are compiled here alone, for every op that measures
// rows of logits. The order of the launches: two without truncation and divergence, one more for a
// part of a vocabulary. Ids and seed stay on the device.
#include "unmasking/measure_rows.cuh"

#include <optional>
#include <tuple>

#include "unmasking/logit_parts_kernel.cuh"

namespace winnow {
namespace {

constexpr int64_t kMostVocab = int64_t{1} << 19;  // what masses in fixed point hold

template <typename Real>
LogitView<Real> view_of(const LogitArguments& call, const Rows& rows, const MaskedTokens& tokens) {
  LogitView<Real> view = view_of<Real>(rows);
  view.start = call.start;
  view.vectors = view.vectors && call.start % kGroup<Real> == 0;
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

// Doubles for `count` structures of this many bytes.
Tensor workspace(int64_t count, size_t bytes, const Tensor& like) {
  return empty({count, static_cast<int64_t>(bytes / sizeof(double))}, ScalarType::Double, like);
}

template <typename Real>
void launch_sums(const LogitView<Real>& view, const LogitArguments& call, const RowSums& sums,
                 const Stream& stream) {
  const int64_t rows = call.rows.count;
  const int64_t blocks = logit_blocks(call.start, call.rows.length);
  const LogitOptions& options = call.options;
  launch("logit_stats", scan_blocks<Real>, {rows, ceil_div<int64_t>(blocks, kSliceBlocks)},
         kThreads, stream, view, options.temperature, options.draw_temperature,
         global<SliceSums>(sums.blocks), blocks);
  if (!options.truncates()) return;
  launch("logit_stats", truncate_rows<Real>, {rows}, kThreads, stream, view, options.temperature,
         options.draw_temperature, options.top_k, options.top_p, options.reach(),
         global<SliceSums>(sums.blocks), global<KeptRange>(sums.truncations),
         global<Sums>(sums.kept));
}

RowSums empty_sums(const LogitArguments& call, const Tensor& like) {
  WINNOW_CHECK(call.options.top_p == 1.0 || call.rows.length <= kMostVocab,
               "top_p: expected a vocabulary of at most ", kMostVocab, " tokens on the GPU, got ",
               call.rows.length);
  const int64_t rows = call.rows.count;
  const int64_t blocks = rows * logit_blocks(call.start, call.rows.length);
  const bool truncates = call.options.truncates();
  return {workspace(blocks, sizeof(SliceSums), like),
          workspace(truncates ? rows : 0, sizeof(KeptRange), like),
          workspace(truncates ? blocks : 0, sizeof(Sums), like)};
}

template <typename Real>
void launch_rows(const LogitArguments& call, const RowOptions& options, const MaskedTokens& tokens,
                 const RowOutputs<Real>& out, const std::optional<Tensor>& part, const Tensor& like,
                 const Stream& stream) {
  const Rows& rows = call.rows;
  const int64_t blocks = logit_blocks(call.start, rows.length);
  LogitView<Real> view = view_of<Real>(call, rows, tokens);
  if (call.unconditional) {
    view.unconditional = source_of<Real>(call.unconditional->tensor);
    view.unconditional_stride = call.unconditional->stride;
    view.vectors = view.vectors && in_groups<Real>(*call.unconditional);
    view.guidance = static_cast<Real>(call.guidance);
  }
  const Grid every_slice = {rows.count, ceil_div<int64_t>(blocks, kSliceBlocks)};
  const Grid every_row = {rows.count};
  const int64_t all = rows.count * blocks;

  const RowSums sums = empty_sums(call, like);
  launch_sums(view, call, sums, stream);
  const auto block_sums = global<SliceSums>(sums.blocks);
  const auto truncations = global<KeptRange>(sums.truncations);
  const auto kept_sums = global<Sums>(sums.kept);
  launch("logit_stats", finish_rows<Real>, every_row, kThreads, stream, view, options, block_sums,
         truncations, kept_sums, out);
  LogitView<Real> previous = {};
  const Tensor before = workspace(call.previous ? all : 0, sizeof(SliceSums), like);
  const Tensor cross = workspace(call.previous ? all : 0, sizeof(double), like);
  const auto previous_sums = global<SliceSums>(before);
  if (call.previous) {
    previous = view_of<Real>(call, *call.previous, tokens);
    const bool described = options.truncates && !options.raw;
    launch("logit_stats", scan_blocks<Real>, every_slice, kThreads, stream, previous,
           options.temperature, options.temperature, previous_sums, blocks);
    launch("logit_stats", cross_blocks<Real>, every_slice, kThreads, stream, view, previous,
           options.temperature, block_sums, previous_sums,
           described ? truncations : Global<KeptRange>(nullptr), global<double>(cross), blocks);
    launch("logit_stats", diverge_rows<Real>, every_row, kThreads, stream, view,
           options.temperature, block_sums, previous_sums,
           described ? kept_sums : Global<Sums>(nullptr), global<double>(cross), out.kl);
  }
  if (part) {
    launch("logit_stats", write_parts<Real>, every_row, kThreads, stream, view, previous, options,
           layout_of(call, std::is_same_v<Real, double>), block_sums,
           PreviousSums{previous_sums, global<double>(cross)}, global<Real>(*part));
  }
}

}  // namespace

RowSums sum_rows(const LogitArguments& call, const Tensor& logits, const Stream& stream) {
  const RowSums sums = empty_sums(call, logits);
  dispatch_real(logits, [&](auto zero) {
    launch_sums(view_of<decltype(zero)>(call, call.rows, MaskedTokens{}), call, sums, stream);
  });
  return sums;
}

void measure_rows(const LogitArguments& call, const MaskedTokens& tokens,
                  const std::optional<Tensor>& seed, const Tensor& logits, const LogitOutputs& out,
                  const Stream& stream, const std::optional<Tensor>& part) {
  RowOptions options = {};
  options.temperature = call.options.temperature;
  options.draw_temperature = call.options.draw_temperature;
  options.draws = call.options.draws;
  options.truncates = call.options.truncates();
  options.raw = call.options.raw;
  options.is_part = call.is_part;
  if (seed) options.seed = seed_of(*seed);
  if (call.target) options.target = global<const int64_t>(*call.target);
  dispatch_real(logits, [&](auto zero) {
    using Real = decltype(zero);
    launch_rows<Real>(call, options, tokens, out.pointers<Real>(), part, logits, stream);
  });
}

namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>
logit_stats_cuda(const Tensor& logits, const std::optional<Tensor>& mask, double temperature,
                 const std::optional<Tensor>& suppress_ids, const std::optional<Tensor>& target_ids,
                 const std::optional<Tensor>& previous_logits,
                 const std::optional<Tensor>& unconditional_logits, double cfg_scale,
                 std::optional<int64_t> top_k, std::optional<double> top_p,
                 std::optional<double> min_p, const std::optional<Tensor>& seed, bool raw,
                 std::optional<int64_t> vocab_start, bool shift,
                 const std::optional<Tensor>& row_keys) {
  const LogitArguments call = check_logit_arguments(
      {logits, mask, temperature, suppress_ids, target_ids, previous_logits, unconditional_logits,
       cfg_scale, top_k, top_p, min_p, seed, raw, vocab_start, shift, row_keys},
      check_device);
  const Stream stream(logits);
  const LogitOutputs out(logits, target_ids.has_value(), previous_logits.has_value());
  Shape part_shape = {0};
  if (vocab_start) {
    part_shape = leading_shape(logits);
    part_shape.push_back(layout_of(call, logits.scalar_type() == ScalarType::Double).words());
  }
  const Tensor part = empty(part_shape, statistics_dtype(logits), logits);
  measure_rows(call, MaskedTokens{}, seed, logits, out, stream,
               vocab_start ? std::optional<Tensor>(part) : std::nullopt);
  return std::tuple_cat(out.tensors(), std::make_tuple(part));
}

}  // namespace
}  // namespace winnow

WINNOW_DEVICE_OPERATORS(m) {
  m.impl("logit_stats", TORCH_BOX(&winnow::logit_stats_cuda));
}
