// Statistics of rows on the CPU. Blocks of all rows that count are spread over threads, so that one
// long row fills a machine too; then each row's blocks are merged in order and its token is drawn.
#include <algorithm>
#include <cmath>
#include <memory>

#include "common/parallel.h"
#include "unmasking/logit_stats.h"
#include "unmasking/logit_stats_simd.h"
#include "unmasking/logit_truncation_simd.h"

namespace winnow {
namespace {

constexpr int64_t kGrain = 32;  // blocks per task

// Sums need no zeros first.
template <typename T>
std::unique_ptr<T[]> uninitialised(int64_t count) {
  return std::unique_ptr<T[]>(new T[static_cast<size_t>(count)]);
}

std::vector<int64_t> sorted_ids(const LogitArguments& arguments, int64_t also) {
  std::vector<int64_t> ids;
  if (arguments.suppressed) {
    const auto* begin = static_cast<const int64_t*>(arguments.suppressed->data_ptr());
    ids.assign(begin, begin + arguments.suppressed->numel());
  }
  const int64_t vocab = arguments.rows.length;
  if (also >= 0 && also < vocab) ids.push_back(also);
  std::sort(ids.begin(), ids.end());
  if (!arguments.is_part) {
    WINNOW_CHECK(ids.empty() || (ids.front() >= 0 && ids.back() < vocab),
                 "suppress_ids: expected ids in [0, ", vocab, "), got ",
                 ids.empty()       ? 0
                 : ids.front() < 0 ? ids.front()
                                   : ids.back());
    return ids;
  }
  std::vector<int64_t> own;  // the others are in other parts
  for (const int64_t id : ids) {
    WINNOW_CHECK(id >= 0, "suppress_ids: expected ids of at least 0, got ", id);
    const int64_t at = id - arguments.start;
    if (at >= 0 && at < vocab) own.push_back(at);
  }
  return own;
}

float logit_at(const LogitRows& rows, int64_t row, int64_t index) {
  float logit;
  WINNOW_SIMD(copy_logits)(rows, row, index, 1, &logit);
  return logit;
}

// Whether the second largest logit survives a truncation.
bool keeps_second(const LogitDistribution& full, const Truncation& kept) {
  const double cut = kept.threshold;
  return full.second > cut ||
         (full.second == cut && (full.reference > cut ? kept.ties >= 1 : kept.ties >= 2));
}

// A row before it is rounded, and what later stages need of it.
struct Row {
  RowStats stats;
  LogitDistribution measured;  // what the statistics describe
  Truncation kept = kKeepAll;  // what of it is kept
  bool proper = false;         // describe() said so
};

// Memory that rows of one task share, for truncation alone.
struct Scratch {
  std::vector<float> logits;
  std::vector<LogitBlockSums> kept;
};

int64_t draw_token(const LogitProblem& problem, int64_t source, const LogitBlockSums* sums,
                   const BlockRace& race, const Truncation& kept) {
  if (race.block() < 0) return -1;
  int64_t token = -1;
  WINNOW_SIMD(draw_in_logit_block)
  (problem.view, source, race.block(), sums[race.block()].reference,
   problem.arguments.options.draw_temperature, race.uniform(), kept, &token);
  return token;
}

// What top-k, top-p and min-p keep of a row whose largest logit is `top`.
Truncation find_kept(const LogitProblem& problem, int64_t source, const LogitBlockSums* sums,
                     double top, Scratch& scratch) {
  const LogitRows& rows = problem.view;
  const LogitOptions& options = problem.arguments.options;
  Truncation kept = kKeepAll;
  if (options.top_k > 0 || options.top_p < 1.0) {
    double mass = 0.0;
    for (int64_t b = 0; b < logit_blocks(rows.start, rows.vocab); ++b) {
      const double weight = std::exp((sums[b].reference - top) / options.draw_temperature);
      if (weight > 0.0) mass += weight * sums[b].drawn;
    }
    scratch.logits.resize(static_cast<size_t>(rows.vocab));
    WINNOW_SIMD(find_truncation)
    (rows, source, static_cast<float>(top), options.draw_temperature, options.top_k, options.top_p,
     mass, scratch.logits.data(), &kept);
  }
  const auto least = static_cast<float>(top + options.reach());
  if (least > kept.threshold) kept = {least, rows.vocab, rows.vocab - 1};
  return kept;
}

// From the sums of a row's blocks, which a truncation replaces where the statistics describe it.
Row finish_row(const LogitProblem& problem, size_t active, LogitBlockSums* sums, Scratch& scratch) {
  const int64_t row = problem.active[active];
  const int64_t source = problem.sources[active];
  const LogitRows& rows = problem.view;
  const LogitOptions& options = problem.arguments.options;
  Row result;
  RowStats& stats = result.stats;
  const int64_t blocks = logit_blocks(rows.start, rows.vocab);
  LogitDistribution& measured = result.measured;
  measured = merge_blocks(rows, sums, options.temperature);
  if (!describe(measured, rows.start, stats)) return result;
  result.proper = true;

  const double top = measured.reference;
  Truncation drawn = kKeepAll;
  const LogitBlockSums* drawn_sums = sums;
  if (options.truncates()) {
    drawn = find_kept(problem, source, sums, top, scratch);
    if (options.raw) scratch.kept.resize(static_cast<size_t>(blocks));
    LogitBlockSums* kept = options.raw ? scratch.kept.data() : sums;
    WINNOW_SIMD(sum_kept_blocks)
    (rows, source, static_cast<float>(top), options.draw_temperature, drawn, kept);
    drawn_sums = kept;
    if (!options.raw) {
      const LogitDistribution full = measured;
      measured = merge_blocks(rows, sums, options.temperature);
      measured.argmax = full.argmax;
      measured.second = keeps_second(full, drawn) ? full.second : -kInfinity;
      result.kept = drawn;
      describe(measured, rows.start, stats);
    }
  }
  const auto log_prob = [&](int64_t index) {
    const float logit = logit_at(rows, source, index);
    const Truncation& kept = result.kept;
    const bool keeps =
        logit > kept.threshold || (logit == kept.threshold && index <= kept.last_tie);
    return keeps ? measured.log_prob(logit) : -kInfinity;
  };
  if (options.draws) {
    const BlockRace race = race_blocks(rows, problem.key_of(row), drawn_sums, 0, blocks, top,
                                       options.draw_temperature, problem.seed);
    const int64_t token = draw_token(problem, source, drawn_sums, race, drawn);
    stats.token = rows.start + token;
    if (stats.token != stats.argmax) stats.log_prob = log_prob(token);
  }
  if (const int64_t* target = problem.target_of(row)) {
    const int64_t at = *target - rows.start;
    stats.target_log_prob = at >= 0 && at < rows.vocab ? log_prob(at) : -kInfinity;
  }
  return result;
}

// The sums of previous_logits and the cross terms of one row.
struct Previous {
  const LogitBlockSums* sums;
  const float* cross;
};

void write_part(const LogitProblem& problem, size_t active, const RowStats& stats,
                const LogitBlockSums* sums, const Previous& previous, float* part) {
  const int64_t row = problem.active[active];
  const int64_t source = problem.sources[active];
  const LogitRows& rows = problem.view;
  const LogitOptions& options = problem.arguments.options;
  const PartLayout layout = part_layout(rows.start, rows.vocab, previous.sums != nullptr, false);
  const auto copy = WINNOW_SIMD(copy_logits);
  const auto copy_edges = [&](const LogitRows& from, float* head, float* tail) {
    const int64_t tail_begin = rows.vocab - layout.tail;
    if (layout.head > 0) copy(from, source, 0, layout.head, head);
    if (layout.tail > 0) copy(from, source, tail_begin, layout.tail, tail);
  };
  copy_edges(rows, part + kPartHeader, part + layout.tail_at());
  const int64_t first = layout.head > 0 ? 1 : 0;
  float* words = part + layout.sums_at();
  double reference = -kInfinity;
  for (int64_t b = first; b < first + layout.whole; ++b, words += kSumsWords) {
    const LogitBlockSums& s = sums[b];
    const float values[] = {s.reference, s.second, s.at, s.mass, s.moment, s.drawn};
    std::copy(values, values + kSumsWords, words);
    reference = std::max<double>(reference, s.reference);
  }
  if (previous.sums != nullptr) {
    copy_edges(problem.previous_view, part + layout.previous_at(),
               part + layout.previous_tail_at());
    words = part + layout.previous_sums_at();
    for (int64_t b = first; b < first + layout.whole; ++b, words += kPreviousWords) {
      const LogitBlockSums& s = previous.sums[b];
      const float values[] = {s.reference, s.mass + (s.moment - s.moment), previous.cross[b]};
      std::copy(values, values + kPreviousWords, words);
    }
  }
  part[kMeasured] = 1.0f;
  part[kDrawnIndex] = -1.0f;
  part[kDrawnLogit] = part[kTargetLogit] = -std::numeric_limits<float>::infinity();
  if (options.draws && std::isfinite(reference)) {
    int64_t token = stats.token - rows.start;
    if (layout.head + layout.tail > 0) {
      const BlockRace race =
          race_blocks(rows, problem.key_of(row), sums, first, first + layout.whole, reference,
                      options.draw_temperature, problem.seed);
      token = draw_token(problem, source, sums, race, kKeepAll);
    }
    part[kDrawnIndex] = static_cast<float>(token);
    if (token >= 0) part[kDrawnLogit] = logit_at(rows, source, token);
  }
  if (const int64_t* target = problem.target_of(row)) {
    const int64_t at = *target - rows.start;
    if (at >= 0 && at < rows.vocab) part[kTargetLogit] = logit_at(rows, source, at);
  }
}

std::vector<RowStats> measure_floats(const LogitProblem& problem, float* parts) {
  const LogitRows& view = problem.view;
  const LogitOptions& options = problem.arguments.options;
  const auto count = static_cast<int64_t>(problem.active.size());
  const int64_t blocks = logit_blocks(view.start, view.vocab);
  const bool diverges = problem.previous() != nullptr;
  const auto sums = uninitialised<LogitBlockSums>(count * blocks);
  const auto previous_sums = uninitialised<LogitBlockSums>(diverges ? count * blocks : 0);
  const auto cross = uninitialised<float>(diverges ? count * blocks : 0);
  const auto scan = WINNOW_SIMD(scan_logit_blocks);
  parallel_for(0, count * blocks, kGrain, [&](int64_t begin, int64_t end) {
    scan(view, problem.sources.data(), begin, end - begin, options.temperature,
         options.draw_temperature, sums.get() + begin);
    if (!diverges) return;
    scan(problem.previous_view, problem.sources.data(), begin, end - begin, options.temperature,
         options.temperature, previous_sums.get() + begin);
  });
  std::vector<RowStats> results(problem.active.size());
  const int64_t words = parts == nullptr ? 0 : part_words(problem);
  const int64_t grain = options.truncates() || diverges ? 1 : 4;
  parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
    Scratch scratch;
    for (int64_t a = begin; a < end; ++a) {
      const auto active = static_cast<size_t>(a);
      LogitBlockSums* own = sums.get() + a * blocks;
      Row finished = finish_row(problem, active, own, scratch);
      Previous previous = {nullptr, nullptr};
      if (diverges) {
        previous = {previous_sums.get() + a * blocks, cross.get() + a * blocks};
        for (int64_t b = 0; b < blocks; ++b) {
          cross[static_cast<size_t>(a * blocks + b)] =
              block_cross(view, problem.previous_view, problem.sources[active], b, own[b],
                          previous.sums[b], options.temperature, finished.kept);
        }
        if (finished.proper) {
          finished.stats.kl =
              divergence(view, finished.measured, own, previous.sums, previous.cross);
        }
      }
      if (parts != nullptr) {
        write_part(problem, active, finished.stats, own, previous,
                   parts + problem.active[active] * words);
      }
      results[active] = finished.stats;
    }
  });
  return results;
}

void write_double_part(const LogitProblem& problem, size_t active, double* part) {
  const int64_t source = problem.sources[active];
  const LogitRows& rows = problem.view;
  const PartLayout layout =
      part_layout(rows.start, rows.vocab, problem.previous() != nullptr, true);
  part[kMeasured] = 1.0;
  part[kDrawnIndex] = -1.0;
  part[kDrawnLogit] = part[kTargetLogit] = -kInfinity;
  const std::vector<double> logits = load_double_row(rows, source);
  std::copy(logits.begin(), logits.end(), part + kPartHeader);
  if (problem.previous() != nullptr) {
    const std::vector<double> previous = load_double_row(problem.previous_view, source);
    std::copy(previous.begin(), previous.end(), part + layout.previous_at());
  }
  if (const int64_t* target = problem.target_of(problem.active[active])) {
    const int64_t at = *target - rows.start;
    if (at >= 0 && at < rows.vocab) part[kTargetLogit] = logits[static_cast<size_t>(at)];
  }
}

std::vector<RowStats> measure_doubles(const LogitProblem& problem, double* parts) {
  std::vector<RowStats> results(problem.active.size());
  const int64_t words = parts == nullptr ? 0 : part_words(problem);
  parallel_for(0, static_cast<int64_t>(results.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t a = begin; a < end; ++a) {
      const auto active = static_cast<size_t>(a);
      const int64_t row = problem.active[active];
      results[active] = double_row_stats(problem.view, problem.previous(), problem.key_of(row),
                                         problem.sources[active], problem.arguments.options,
                                         problem.seed, problem.target_of(row));
      if (parts != nullptr) write_double_part(problem, active, parts + row * words);
    }
  });
  return results;
}

}  // namespace

void prepare(const LogitRequest& call, LogitProblem& problem, int64_t also_suppressed) {
  problem.arguments = check_logit_arguments(call, check_cpu);
  const LogitArguments& arguments = problem.arguments;
  const Rows& rows = arguments.rows;
  LogitRows& view = problem.view;
  view = {};
  view.logits = rows.tensor.data_ptr();
  view.stride = rows.stride;
  view.type = element_type(call.logits);
  view.vocab = rows.length;
  view.start = arguments.start;
  problem.suppressed = sorted_ids(arguments, also_suppressed);
  view.suppressed = problem.suppressed.data();
  view.suppressed_count = static_cast<int64_t>(problem.suppressed.size());
  problem.previous_view = view;
  if (arguments.previous) {
    problem.previous_view.logits = arguments.previous->tensor.data_ptr();
    problem.previous_view.stride = arguments.previous->stride;
  }
  if (arguments.unconditional) {
    view.unconditional = arguments.unconditional->tensor.data_ptr();
    view.unconditional_stride = arguments.unconditional->stride;
    view.guidance = arguments.guidance;
  }
  problem.seed = call.seed ? seed_on_cpu(*call.seed) : 0;
  const bool* counts =
      arguments.mask ? static_cast<const bool*>(arguments.mask->data_ptr()) : nullptr;
  problem.active.clear();
  problem.sources.clear();
  for (int64_t r = 0; r < rows.count; ++r) {
    if (counts != nullptr && !counts[r]) continue;
    problem.active.push_back(r);
    problem.sources.push_back(arguments.source(r));
  }
  for (const int64_t r : problem.active) {
    const int64_t* target = problem.target_of(r);
    if (target == nullptr) break;
    if (arguments.is_part) {
      WINNOW_CHECK(*target >= 0, "target_ids: expected ids of at least 0 where mask is true, got ",
                   *target);
    } else {
      WINNOW_CHECK(*target >= 0 && *target < rows.length, "target_ids: expected ids in [0, ",
                   rows.length, ") where mask is true, got ", *target);
    }
  }
}

uint64_t seed_on_cpu(const Tensor& seed) {
  check_cpu("seed", seed);
  check_dtype("seed", seed, ScalarType::Long);
  check_dim("seed", seed, 0, "one number");
  return static_cast<uint64_t>(*static_cast<const int64_t*>(seed.data_ptr()));
}

int64_t part_words(const LogitProblem& problem) {
  return part_layout(problem.view.start, problem.view.vocab, problem.previous() != nullptr,
                     problem.view.type == ElementType::kDouble)
      .words();
}

std::vector<RowStats> measure_rows(const LogitProblem& problem, void* parts) {
  return problem.view.type == ElementType::kDouble
             ? measure_doubles(problem, static_cast<double*>(parts))
             : measure_floats(problem, static_cast<float*>(parts));
}

bool describe(const LogitDistribution& row, int64_t start, RowStats& stats) {
  if (row.nan) return false;
  if (std::isinf(row.reference)) {
    stats.logsumexp = row.reference;
    if (row.reference > 0.0) stats.token = stats.argmax = start + row.argmax;
    return false;
  }
  stats.token = stats.argmax = start + row.argmax;
  stats.log_prob = row.log_prob(row.reference);
  stats.max_prob = row.max_prob();
  stats.margin = row.margin();
  stats.entropy = row.entropy();
  stats.logsumexp = row.logsumexp();
  return true;
}

BlockRace race_blocks(const LogitRows& rows, int64_t key, const LogitBlockSums* sums, int64_t first,
                      int64_t end, double reference, double temperature, uint64_t seed) {
  BlockRace race(seed, key);
  for (int64_t b = first; b < end; ++b) {
    const double weight = std::exp((sums[b].reference - reference) / temperature);
    race.enter(b, rows.start / kLogitBlock + b, weight * sums[b].drawn);
  }
  return race;
}

float block_cross(const LogitRows& rows, const LogitRows& previous, int64_t row, int64_t block,
                  const LogitBlockSums& sums, const LogitBlockSums& previous_sums,
                  double temperature, const Truncation& kept) {
  if (!(sums.mass > 0.0f) || std::isinf(sums.reference)) return 0.0f;
  if (std::isinf(previous_sums.reference)) return std::numeric_limits<float>::infinity();
  float cross = 0.0f;
  WINNOW_SIMD(cross_logit_block)
  (rows, previous, row, block, sums.reference, previous_sums.reference, temperature, kept, &cross);
  return cross;
}

double divergence(const LogitRows& rows, const LogitDistribution& measured,
                  const LogitBlockSums* sums, const LogitBlockSums* previous_sums,
                  const float* cross) {
  const LogitDistribution previous = merge_blocks(rows, previous_sums, measured.temperature);
  if (previous.nan || previous.reference == kInfinity) return kNan;
  if (previous.reference == -kInfinity) return kInfinity;
  double sum = 0.0;
  for (int64_t b = 0; b < logit_blocks(rows.start, rows.vocab); ++b) {
    const double shift = sums[b].reference - measured.reference;
    const double weight = std::exp(shift / measured.temperature);
    if (!(weight * sums[b].mass > 0.0)) continue;
    if (std::isinf(previous_sums[b].reference)) return kInfinity;
    const double apart = shift - (previous_sums[b].reference - previous.reference);
    sum += weight * (cross[b] * kOctaveUnit + apart / measured.temperature * sums[b].mass);
  }
  const double kl = sum / measured.mass - std::log(measured.mass) + std::log(previous.mass);
  return kl < 0.0 ? 0.0 : kl;
}

}  // namespace winnow
