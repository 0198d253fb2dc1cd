// winnow::speculative_verify on the CPU. One step of all rows at a time: the rows of a step are
// read only where the drafts before it were accepted, and blocks of the vocabulary are spread over
// threads. Then the rows that stopped draw their token from what the drafts left of the target.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include "common/checks.h"
#include "common/parallel.h"
#include "common/philox.h"
#include "common/tensors.h"
#include "unmasking/logit_draw.h"
#include "unmasking/speculative_verify.h"
#include "unmasking/verification_rows.h"

namespace winnow {
namespace {

constexpr int64_t kStepBlocks = (int64_t{1} << 32) / kLogitBlock;  // keys of a step, in blocks
// The last element of a step: no block begins there.
constexpr uint64_t kAcceptance = (uint64_t{1} << 32) - 1;

// The checked arguments.
struct Problem {
  Rows target_rows;
  std::optional<Rows> draft_rows;
  Tensor draft_tokens;
  std::optional<Tensor> lengths;
  std::optional<Tensor> order;
  int64_t batch;
  int64_t steps;    // rows of the target that a batch row may need
  int64_t places;   // rows of the target per batch row
  int64_t drafts;   // drafted tokens per batch row, by place
  int64_t drafted;  // steps with a draft, where lengths says nothing
  double temperature;
  uint64_t seed;

  int64_t length(int64_t b) const {
    return lengths ? static_cast<const int64_t*>(lengths->data_ptr())[b] : drafted;
  }
  // Which row of a batch row's logits step j is about; -1: none, the row ends.
  int64_t place(int64_t b, int64_t j) const {
    if (j >= steps) return -1;
    return order ? static_cast<const int64_t*>(order->data_ptr())[b * steps + j] : j;
  }
  int64_t token(int64_t b, int64_t place) const {
    return static_cast<const int64_t*>(draft_tokens.data_ptr())[b * drafts + place];
  }
};

LogitRows view_of(const Rows& rows) {
  return {rows.tensor.data_ptr(),    rows.stride, nullptr, 0,           1.0,
          element_type(rows.tensor), nullptr,     0,       rows.length, 0};
}

struct Outcome {
  int64_t accepted = 0;
  int64_t token = -1;
  std::vector<int64_t> tokens;  // accepted ones and the drawn one
  std::vector<double> log_prob;
  bool lost = false;  // the step after them has no distribution

  void put(int64_t id, double log_p) {
    tokens.push_back(id);
    log_prob.push_back(log_p);
  }
};

// A batch row whose token is still to be drawn.
struct Pending {
  int64_t row;
  int64_t step;
  ResidualPlace place;
};

template <typename Verification>
class Verifier {
 public:
  Verifier(const Problem& problem, const Verification& rows)
      : problem_(problem),
        rows_(rows),
        greedy_(problem.temperature == 0.0),
        temperature_(greedy_ ? 1.0 : problem.temperature),
        outcomes_(static_cast<size_t>(problem.batch)) {}

  std::vector<Outcome> run() {
    std::vector<int64_t> alive(outcomes_.size());
    for (size_t b = 0; b < alive.size(); ++b) alive[b] = static_cast<int64_t>(b);
    for (int64_t step = 0; !alive.empty(); ++step) alive = verify(step, alive);
    draw();
    return std::move(outcomes_);
  }

 private:
  double uniform(int64_t row, int64_t step) const {
    const Philox4 bits = philox(problem_.seed, static_cast<uint64_t>(row),
                                (static_cast<uint64_t>(step) << 32) + kAcceptance);
    return open_uniform(bits.x[0], bits.x[1]);
  }

  // One step of the rows that are alive; returns those that still are.
  std::vector<int64_t> verify(int64_t step, std::vector<int64_t> alive) {
    const auto ends = [&](int64_t b) { return problem_.place(b, step) < 0; };
    alive.erase(std::remove_if(alive.begin(), alive.end(), ends), alive.end());
    std::vector<int64_t> targets;
    std::vector<int64_t> drafts;
    for (const int64_t b : alive) {
      targets.push_back(b * problem_.places + problem_.place(b, step));
      if (reads_draft(b, step)) drafts.push_back(b * problem_.drafts + problem_.place(b, step));
    }
    const std::vector<MeasuredRow> target = rows_.measure(true, targets);
    const std::vector<MeasuredRow> draft = rows_.measure(false, drafts);
    std::vector<int64_t> still;
    size_t next_draft = 0;
    for (size_t i = 0; i < alive.size(); ++i) {
      const int64_t b = alive[i];
      ResidualPlace place = {targets[i], target[i], -1, {}, -1};
      if (reads_draft(b, step)) {
        place.draft = drafts[next_draft];
        place.draft_measured = draft[next_draft++];
      }
      if (decide(b, step, place)) still.push_back(b);
    }
    return still;
  }

  bool reads_draft(int64_t b, int64_t step) const {
    return !greedy_ && problem_.draft_rows && step < problem_.length(b);
  }

  // Whether the row goes on; else its token is known, pending or lost.
  bool decide(int64_t b, int64_t step, ResidualPlace place) {
    Outcome& out = outcomes_[static_cast<size_t>(b)];
    const MeasuredRow& p = place.target_measured;
    if (!p.proper || (place.draft >= 0 && !place.draft_measured.proper)) {
      out.lost = true;
      return false;
    }
    if (step < problem_.length(b)) {
      const int64_t id = problem_.token(b, problem_.place(b, step));
      const double log_p = p.log_prob(rows_.logit(true, place.target, id), temperature_);
      bool accepted = id == p.argmax;
      if (!greedy_) {
        const double log_q =
            place.draft < 0
                ? 0.0
                : place.draft_measured.log_prob(rows_.logit(false, place.draft, id), temperature_);
        accepted = std::log(uniform(b, step)) + log_q < log_p;
        if (place.draft < 0) place.excluded = id;
      }
      if (accepted) {
        out.put(id, log_p);
        ++out.accepted;
        return true;
      }
    }
    if (greedy_) {
      out.token = p.argmax;
      out.put(out.token, p.log_prob(p.reference, temperature_));
    } else {
      pending_.push_back({b, step, place});
    }
    return false;
  }

  // Blocks of the vocabulary compete in proportion to their mass, then one of them is inverted.
  void draw() {
    const LogitRows view = view_of(problem_.target_rows);
    const int64_t blocks = logit_blocks(view.start, view.vocab);
    const auto count = static_cast<int64_t>(pending_.size());
    std::vector<double> masses(static_cast<size_t>(count * blocks));
    parallel_for(0, count * blocks, 32, [&](int64_t begin, int64_t end) {
      for (int64_t u = begin; u < end; ++u) {
        masses[static_cast<size_t>(u)] =
            rows_.block_mass(pending_[static_cast<size_t>(u / blocks)].place, u % blocks);
      }
    });
    parallel_for(0, count, 4, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        draw_token(pending_[static_cast<size_t>(i)], masses.data() + i * blocks, blocks);
      }
    });
  }

  void draw_token(Pending& pending, double* masses, int64_t blocks) {
    ResidualPlace& place = pending.place;
    if (!std::any_of(masses, masses + blocks, [](double mass) { return mass > 0.0; })) {
      // The two distributions are equal but for rounding, which rejected the draft: any token of
      // the target will do.
      place.draft = -1;
      place.excluded = -1;
      for (int64_t b = 0; b < blocks; ++b) masses[b] = rows_.block_mass(place, b);
    }
    BlockRace race(problem_.seed, pending.row);
    for (int64_t b = 0; b < blocks; ++b) race.enter(b, pending.step * kStepBlocks + b, masses[b]);
    Outcome& out = outcomes_[static_cast<size_t>(pending.row)];
    out.token = rows_.draw(place, race.block(), race.uniform());
    out.put(out.token, place.target_measured.log_prob(rows_.logit(true, place.target, out.token),
                                                      temperature_));
  }

  const Problem& problem_;
  const Verification& rows_;
  const bool greedy_;
  const double temperature_;
  std::vector<Outcome> outcomes_;
  std::vector<Pending> pending_;
};

void check_indices(const Problem& problem) {
  std::vector<int64_t> seen(problem.order ? static_cast<size_t>(problem.places) : 0, -1);
  for (int64_t b = 0; b < problem.batch; ++b) {
    const int64_t length = problem.length(b);
    WINNOW_CHECK(length >= 0 && length <= problem.drafted, "lengths: expected numbers in [0, ",
                 problem.drafted, "], got ", length);
    for (int64_t j = 0; j < problem.steps; ++j) {
      const int64_t place = problem.place(b, j);
      WINNOW_CHECK(place >= -1 && place < problem.places, "order: expected positions in [0, ",
                   problem.places, "), or -1 for none, got ", place);
      if (place < 0) break;
      if (problem.order && j <= length) {
        int64_t& row = seen[static_cast<size_t>(place)];
        WINNOW_CHECK(row != b, "order: expected every position once, got ", place, " twice");
        row = b;
      }
      if (j >= length) continue;
      const int64_t id = problem.token(b, place);
      WINNOW_CHECK(id >= 0 && id < problem.target_rows.length, "draft_tokens: expected ids in [0, ",
                   problem.target_rows.length, ") where they are verified, got ", id);
    }
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor> speculative_verify(
    const Tensor& draft_tokens, const std::optional<Tensor>& draft_logits,
    const Tensor& target_logits, double temperature, const std::optional<Tensor>& lengths,
    const std::optional<Tensor>& order, const std::optional<Tensor>& seed) {
  check_cpu("target_logits", target_logits);
  check_cpu("draft_tokens", draft_tokens);
  if (draft_logits) check_cpu("draft_logits", *draft_logits);
  if (lengths) check_cpu("lengths", *lengths);
  if (order) check_cpu("order", *order);
  if (seed) check_cpu("seed", *seed);
  const VerificationShape sizes = check_verification(draft_tokens, draft_logits, target_logits,
                                                     temperature, lengths, order, seed);

  Problem problem = {};
  problem.target_rows = as_rows(target_logits);
  if (draft_logits) problem.draft_rows = as_rows(*draft_logits);
  problem.draft_tokens = dense(draft_tokens);
  if (lengths) problem.lengths = dense(*lengths);
  if (order) problem.order = dense(*order);
  problem.batch = sizes.batch;
  problem.steps = sizes.steps;
  problem.places = sizes.places;
  problem.drafts = sizes.drafts;
  problem.drafted = sizes.drafted;
  problem.temperature = temperature;
  if (seed) problem.seed = static_cast<uint64_t>(*static_cast<const int64_t*>(seed->data_ptr()));
  check_indices(problem);

  const LogitRows target = view_of(problem.target_rows);
  const LogitRows draft = problem.draft_rows ? view_of(*problem.draft_rows) : target;
  const double divisor = temperature == 0.0 ? 1.0 : temperature;
  const std::vector<Outcome> outcomes =
      target.type == ElementType::kDouble
          ? Verifier(problem, DoubleVerification(target, draft, divisor)).run()
          : Verifier(problem, FloatVerification(target, draft, divisor)).run();

  const Shape rows = {sizes.batch};
  const Shape steps = {sizes.batch, sizes.steps};
  const Tensor accepted = empty(rows, ScalarType::Long, target_logits);
  const Tensor token = empty(rows, ScalarType::Long, target_logits);
  const Tensor tokens = empty(steps, ScalarType::Long, target_logits);
  const Tensor log_prob = empty(steps, statistics_dtype(target_logits), target_logits);
  auto* ids = static_cast<int64_t*>(tokens.data_ptr());
  for (int64_t b = 0; b < sizes.batch; ++b) {
    const Outcome& out = outcomes[static_cast<size_t>(b)];
    static_cast<int64_t*>(accepted.data_ptr())[b] = out.accepted;
    static_cast<int64_t*>(token.data_ptr())[b] = out.token;
    const auto known = static_cast<int64_t>(out.tokens.size());
    for (int64_t j = 0; j < sizes.steps; ++j) {
      const int64_t at = b * sizes.steps + j;
      ids[at] = j < known ? out.tokens[static_cast<size_t>(j)] : -1;
      const double log_p = j < known                ? out.log_prob[static_cast<size_t>(j)]
                           : j == known && out.lost ? std::numeric_limits<double>::quiet_NaN()
                                                    : 0.0;
      if (target.type == ElementType::kDouble) {
        static_cast<double*>(log_prob.data_ptr())[at] = log_p;
      } else {
        static_cast<float*>(log_prob.data_ptr())[at] = static_cast<float>(log_p);
      }
    }
  }
  return {accepted, token, tokens, log_prob};
}

}  // namespace
}  // namespace winnow

STABLE_TORCH_LIBRARY_IMPL(winnow, CPU, m) {
  m.impl("speculative_verify", TORCH_BOX(&winnow::speculative_verify));
}
