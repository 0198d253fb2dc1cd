// winnow::merge_logit_stats on the CPU: puts the blocks of a row together again and finishes it as
// logit_stats does.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <tuple>
#include <vector>

#include "common/parallel.h"
#include "unmasking/logit_outputs.h"
#include "unmasking/logit_stats.h"
#include "unmasking/logit_stats_simd.h"

namespace winnow {
namespace {

// One part of the vocabulary.
struct Part {
  Tensor tensor;
  const void* data;
  PartLayout layout;
  int64_t start;
  int64_t count;
};

struct Merge {
  std::vector<Part> parts;
  LogitOptions options;
  uint64_t seed;
  bool has_target;
  bool has_previous;
  LogitRows rows;       // the whole: for its start and length
  const int64_t* keys;  // of the draws, or null

  int64_t key_of(int64_t row) const { return keys == nullptr ? row : keys[row]; }
};

// A row of all the parts, block by block.
class WholeRow {
 public:
  WholeRow(const Merge& merge, int64_t row) : merge_(merge), row_(row) {
    for (const Part& part : merge.parts) add(part);
    flush();
  }

  RowStats stats() const {
    RowStats stats;
    if (!measured_) return kSkipped;
    const LogitOptions& options = merge_.options;
    const LogitDistribution measured = merge_blocks(merge_.rows, sums_.data(), options.temperature);
    if (!describe(measured, merge_.rows.start, stats)) return stats;
    if (options.draws) {
      BlockRace race(merge_.seed, merge_.key_of(row_));
      for (size_t b = 0; b < sums_.size(); ++b) {
        if (drawn_[b].token < 0 && edges_[b].count == 0) continue;
        const double weight =
            std::exp((sums_[b].reference - measured.reference) / options.draw_temperature);
        race.enter(static_cast<int64_t>(b), merge_.rows.start / kLogitBlock + b,
                   weight * sums_[b].drawn);
      }
      if (race.block() < 0) return kSkipped;  // the parts drew nothing
      const Drawn drawn = token_of(race);
      stats.token = drawn.token;
      if (stats.token != stats.argmax) stats.log_prob = measured.log_prob(drawn.logit);
    }
    if (merge_.has_target) stats.target_log_prob = measured.log_prob(target_);
    if (merge_.has_previous) {
      stats.kl = divergence(merge_.rows, measured, sums_.data(), previous_.data(), cross_.data());
    }
    return stats;
  }

 private:
  struct Drawn {
    int64_t token;
    float logit;
  };
  // A block of which several parts sent logits; its own lie at `at` in logits_.
  struct Edge {
    size_t at;
    int64_t count;
  };

  void add(const Part& part) {
    const float* words = static_cast<const float*>(part.data) + row_ * part.layout.words();
    measured_ = measured_ && words[kMeasured] != 0.0f;
    if (!measured_) return;
    const PartLayout& layout = part.layout;
    target_ = std::max(target_, words[kTargetLogit]);
    append(words + kPartHeader, words + layout.previous_at(), layout.head, part.start);
    const size_t first = sums_.size();
    for (int64_t b = 0; b < layout.whole; ++b) {
      const float* s = words + layout.sums_at() + b * kSumsWords;
      float previous_mass = 0.0f;
      LogitBlockSums before = {};
      float cross = 0.0f;
      if (merge_.has_previous) {
        const float* p = words + layout.previous_sums_at() + b * kPreviousWords;
        previous_mass = p[1];
        before = {p[0], 0.0f, -1.0f, previous_mass, previous_mass - previous_mass, 0.0f};
        cross = p[2];
      }
      close({s[0], s[1], s[2], s[3], s[4], s[5]}, before, cross, {logits_.size(), 0});
    }
    // A part may be anybody's numbers: an index that lies in no whole block is no draw.
    const float index = words[kDrawnIndex];
    const int64_t end = layout.head + layout.whole * kLogitBlock;
    if (index >= static_cast<float>(layout.head) && index < static_cast<float>(end)) {
      const auto token = static_cast<int64_t>(index);
      const auto at = static_cast<size_t>((token - layout.head) / kLogitBlock);
      drawn_[first + at] = {part.start + token, words[kDrawnLogit]};
    }
    append(words + layout.tail_at(), words + layout.previous_tail_at(), layout.tail,
           part.start + part.count - layout.tail);
  }

  // Logits of a block that is not complete yet, the first one at `start` in the vocabulary.
  void append(const float* logits, const float* previous, int64_t count, int64_t start) {
    if (count == 0) return;
    logits_.insert(logits_.end(), logits, logits + count);
    if (merge_.has_previous) {
      previous_logits_.insert(previous_logits_.end(), previous, previous + count);
    }
    if ((start + count) % kLogitBlock == 0) flush();
  }

  LogitRows edge_rows(const std::vector<float>& logits, const Edge& edge, int64_t start) const {
    LogitRows rows = {};
    rows.logits = logits.data() + edge.at;
    rows.type = ElementType::kFloat;
    rows.vocab = edge.count;
    rows.start = start;
    return rows;
  }

  int64_t block_start(size_t block) const {
    return merge_.rows.start + block_begin(merge_.rows, static_cast<int64_t>(block));
  }

  void flush() {
    const Edge edge = {flushed_, static_cast<int64_t>(logits_.size() - flushed_)};
    flushed_ = logits_.size();
    if (edge.count == 0) return;
    const LogitOptions& options = merge_.options;
    const int64_t start = block_start(sums_.size());
    const int64_t only = 0;
    const auto scan = WINNOW_SIMD(scan_logit_blocks);
    LogitBlockSums sums;
    LogitBlockSums before = {};
    float cross = 0.0f;
    const LogitRows rows = edge_rows(logits_, edge, start);
    scan(rows, &only, 0, 1, options.temperature, options.draw_temperature, &sums);
    if (merge_.has_previous) {
      const LogitRows previous = edge_rows(previous_logits_, edge, start);
      scan(previous, &only, 0, 1, options.temperature, options.temperature, &before);
      cross = block_cross(rows, previous, 0, 0, sums, before, options.temperature, kKeepAll);
    }
    close(sums, before, cross, edge);
  }

  void close(const LogitBlockSums& sums, const LogitBlockSums& previous, float cross, Edge edge) {
    sums_.push_back(sums);
    drawn_.push_back({-1, 0.0f});
    edges_.push_back(edge);
    if (!merge_.has_previous) return;
    previous_.push_back(previous);
    cross_.push_back(cross);
  }

  Drawn token_of(const BlockRace& race) const {
    const auto b = static_cast<size_t>(race.block());
    if (edges_[b].count == 0) return drawn_[b];
    const LogitRows rows = edge_rows(logits_, edges_[b], block_start(b));
    int64_t index = -1;
    WINNOW_SIMD(draw_in_logit_block)
    (rows, 0, 0, sums_[b].reference, merge_.options.draw_temperature, race.uniform(), kKeepAll,
     &index);
    return {rows.start + index, logits_[edges_[b].at + static_cast<size_t>(index)]};
  }

  const Merge& merge_;
  const int64_t row_;
  bool measured_ = true;
  float target_ = -std::numeric_limits<float>::infinity();
  std::vector<LogitBlockSums> sums_;
  std::vector<Drawn> drawn_;  // by each block's owner, where it is the first of the owner's blocks
  std::vector<Edge> edges_;
  std::vector<LogitBlockSums> previous_;
  std::vector<float> cross_;
  std::vector<float> logits_;  // of the edges
  std::vector<float> previous_logits_;
  size_t flushed_ = 0;
};

RowStats double_stats(const Merge& merge, int64_t row) {
  std::vector<double> logits;
  std::vector<double> previous;
  double target = -kInfinity;
  for (const Part& part : merge.parts) {
    const double* words = static_cast<const double*>(part.data) + row * part.layout.words();
    if (words[kMeasured] == 0.0) return kSkipped;
    target = std::max(target, words[kTargetLogit]);
    logits.insert(logits.end(), words + kPartHeader, words + kPartHeader + part.count);
    if (!merge.has_previous) continue;
    const double* before = words + part.layout.previous_at();
    previous.insert(previous.end(), before, before + part.count);
  }
  LogitRows rows = merge.rows;
  rows.logits = logits.data();
  rows.type = ElementType::kDouble;
  LogitRows previous_rows = rows;
  previous_rows.logits = previous.data();
  RowStats stats = double_row_stats(rows, merge.has_previous ? &previous_rows : nullptr,
                                    merge.key_of(row), 0, merge.options, merge.seed, nullptr);
  if (merge.has_target && !std::isnan(stats.max_prob)) {
    stats.target_log_prob = target / merge.options.temperature - stats.logsumexp;
  }
  return stats;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>
merge_logit_stats(const std::vector<Tensor>& parts, const std::vector<int64_t>& starts,
                  const std::vector<int64_t>& counts, double temperature,
                  const std::optional<Tensor>& seed, bool raw, bool has_target, bool has_previous,
                  const std::optional<Tensor>& row_keys) {
  check_parts(parts, starts, counts, has_previous, check_cpu);
  Merge merge = {};
  merge.options = logit_options(temperature, seed.has_value(), raw);
  if (seed) merge.seed = seed_on_cpu(*seed);
  merge.has_target = has_target;
  merge.has_previous = has_previous;
  const Tensor& like = parts.front();
  const auto keys = one_per_row("row_keys", row_keys, like, ScalarType::Long, check_cpu);
  merge.keys = keys ? static_cast<const int64_t*>(keys->data_ptr()) : nullptr;
  const bool is_double = like.scalar_type() == ScalarType::Double;
  for (size_t p = 0; p < parts.size(); ++p) {
    const Tensor part = dense(parts[p]);
    merge.parts.push_back({part, part.data_ptr(),
                           part_layout(starts[p], counts[p], has_previous, is_double), starts[p],
                           counts[p]});
    merge.rows.vocab += counts[p];
  }
  merge.rows.start = starts.front();

  const Shape leading = leading_shape(like);
  const Outputs out(leading, like, has_target, has_previous);
  parallel_for(0, product(leading), 4, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      out.put(row, is_double ? double_stats(merge, row) : WholeRow(merge, row).stats());
    }
  });
  return out.tensors();
}

}  // namespace
}  // namespace winnow

STABLE_TORCH_LIBRARY_IMPL(winnow, CPU, m) {
  m.impl("merge_logit_stats", TORCH_BOX(&winnow::merge_logit_stats));
}
