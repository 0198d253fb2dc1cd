// The kernels of winnow::speculative_verify. A block measures a slice of a row of either model;
// then every block of a batch row walks through its steps by itself, which costs less than another
// launch, sums the residual of one slice, and at last one block draws the token.
#pragma once

#include "unmasking/logit_rows_kernel.cuh"

namespace winnow {
namespace {

constexpr uint64_t kStepKey = uint64_t{1} << 32;  // elements of a step; slices begin below
constexpr uint64_t kAcceptance = kStepKey - 1;    // the last of them: no slice begins there

// Which rows the steps of a batch row are about, and what is drawn.
struct Steps {
  Global<const int64_t> draft_tokens;
  Global<const int64_t> order;    // or null
  Global<const int64_t> lengths;  // or null
  int64_t batch;
  int64_t steps;
  int64_t places;     // rows of the target per batch row
  int64_t drafts;     // drafted tokens per batch row
  int64_t drafted;    // steps that have a draft, at most
  bool draws_drafts;  // whether drafts have logits; they are certain otherwise
  bool greedy;
  double temperature;
  Seed seed;

  WINNOW_DEVICE int64_t length(int64_t b) const {
    if (!lengths) return drafted;
    const int64_t n = lengths[b];
    return n < 0 ? 0 : n < drafted ? n : drafted;
  }
  // -1: none, the row ends.
  WINNOW_DEVICE int64_t place(int64_t b, int64_t j) const {
    if (j >= steps) return -1;
    if (!order) return j;
    const int64_t at = order[b * steps + j];
    return at < places ? at : -1;
  }
  WINNOW_DEVICE bool reads_draft(int64_t b, int64_t j) const {
    return draws_drafts && j < length(b);
  }
};

template <typename Real>
struct Models {
  LogitView<Real> target;
  LogitView<Real> draft;
};

// Slice sums of the target's rows of all steps, then of the draft's.
template <typename Real>
WINNOW_KERNEL(kThreads)
measure_steps(Models<Real> models, Steps steps, Global<SliceSums> sums) {
  WINNOW_SHARED(TopTwo, top_scratch, kThreads / kWarp);
  WINNOW_SHARED(Sums, sum_scratch, kThreads / kWarp);
  const int64_t count = steps.batch * steps.steps;
  const bool of_target = block_index() < count;
  const int64_t b = block_index() % count / steps.steps;
  const int64_t j = block_index() % steps.steps;
  const int64_t place = steps.place(b, j);
  const int64_t slice = block_index_y();
  if (place < 0 || j > steps.length(b) || (!of_target && !steps.reads_draft(b, j))) return;
  const LogitView<Real>& view = of_target ? models.target : models.draft;
  const int64_t row = b * (of_target ? steps.places : steps.drafts) + place;
  Real x[kPerThread];
  load_plain_slice(view, row, slice, x);
  const Real none = -std::numeric_limits<Real>::infinity();
  Real first = none;
  int at = -1;
  bool nan = false;
#pragma unroll
  for (int e = 0; e < kPerThread; ++e) {
    nan = nan || x[e] != x[e];
    if (x[e] > first) {
      first = x[e];
      at = e;
    }
  }
  TopTwo top = {first, none, at < 0 ? -1 : slice * kSlice + within_slice<Real>(at), nan};
  top = block_reduce<kThreads>(top, Shared<TopTwo>(top_scratch), merge_tops);
  Real mass = Real(0);
  const Real reference = static_cast<Real>(top.first);
  if (reference != none && reference != -none) {
    const Real scale = exponent_scale<Real>(steps.temperature);
#pragma unroll
    for (int e = 0; e < kPerThread; ++e) {
      mass += exp2_of((x[e] - reference) * scale);
    }
  }
  const Sums all =
      block_reduce<kThreads>(Sums{mass, 0.0, 0.0}, Shared<Sums>(sum_scratch), add_sums);
  if (thread_index() == 0) {
    sums[block_index() * ceil_div<int64_t>(view.vocab, kSlice) + slice] = SliceSums{top, all};
  }
}

// How far a batch row got, the same for all threads.
struct Verdict {
  int64_t accepted;
  int64_t step;      // at which a token is drawn; -1: none
  int64_t target;    // row, as the rest
  int64_t draft;     // or -1
  int64_t excluded;  // a token that must not be drawn, or -1
  Distribution target_distribution;
  Distribution draft_distribution;
  bool lost;  // the step has no distribution
};

WINNOW_DEVICE double log_prob_of(const Distribution& row, double logit, double temperature) {
  return (logit - row.top.first) / temperature - log(row.mass);
}

// `emit(step, token, log_prob)` for each accepted draft.
template <typename Real, typename Emit>
WINNOW_DEVICE Verdict walk(const Models<Real>& models, const Steps& steps, int64_t b,
                           Global<const SliceSums> sums, Shared<TopTwo> top_scratch,
                           Shared<Sums> sum_scratch, const Emit& emit) {
  const int64_t slices = ceil_div<int64_t>(models.target.vocab, kSlice);
  const auto measured = [&](int64_t row) {
    return merge_row(sums + row * slices, slices, steps.temperature, top_scratch, sum_scratch);
  };
  Verdict verdict = {};
  verdict.step = -1;
  for (int64_t j = 0;; ++j) {
    const int64_t place = steps.place(b, j);
    if (place < 0) return verdict;
    const bool drafted = j < steps.length(b);
    const bool reads_draft = !steps.greedy && steps.reads_draft(b, j);
    verdict.target = b * steps.places + place;
    verdict.target_distribution = measured(b * steps.steps + j);
    verdict.draft = -1;
    verdict.excluded = -1;
    if (reads_draft) {
      verdict.draft = b * steps.drafts + place;
      verdict.draft_distribution = measured((steps.batch + b) * steps.steps + j);
    }
    if (!is_proper(verdict.target_distribution.top) ||
        (reads_draft && !is_proper(verdict.draft_distribution.top))) {
      verdict.lost = true;
      verdict.step = j;
      return verdict;
    }
    bool accepted = false;
    if (drafted) {
      const int64_t token = steps.draft_tokens[b * steps.drafts + place];
      const bool known = token >= 0 && token < models.target.vocab;
      double log_p = -std::numeric_limits<double>::infinity();
      if (known) {
        log_p = log_prob_of(verdict.target_distribution,
                            plain_logit(models.target, verdict.target, token), steps.temperature);
      }
      if (steps.greedy) {
        accepted = token == verdict.target_distribution.top.argmax;
      } else if (known) {
        double log_q = 0.0;
        if (reads_draft) {
          log_q = log_prob_of(verdict.draft_distribution,
                              plain_logit(models.draft, verdict.draft, token), steps.temperature);
        }
        const Philox4 words = philox(steps.seed.get(), static_cast<uint64_t>(b),
                                     static_cast<uint64_t>(j) * kStepKey + kAcceptance);
        accepted = log(open_uniform(words.x[0], words.x[1])) + log_q < log_p;
      }
      if (accepted) {
        emit(j, token, log_p);
        ++verdict.accepted;
        continue;
      }
      if (!reads_draft && !steps.greedy) verdict.excluded = token;
    }
    verdict.step = j;
    return verdict;
  }
}

// What is left of the target: max(p - q, 0).
template <typename Real>
struct Residual {
  const Models<Real>& models;
  int64_t target;
  int64_t draft;  // or -1
  int64_t excluded;
  Real target_reference, target_share, draft_reference, draft_share, scale;

  WINNOW_DEVICE Residual(const Models<Real>& models_, const Verdict& verdict, double temperature)
      : models(models_),
        target(verdict.target),
        draft(verdict.draft),
        excluded(verdict.excluded),
        target_reference(static_cast<Real>(verdict.target_distribution.top.first)),
        target_share(static_cast<Real>(1.0 / verdict.target_distribution.mass)),
        draft_reference(static_cast<Real>(verdict.draft_distribution.top.first)),
        draft_share(static_cast<Real>(1.0 / verdict.draft_distribution.mass)),
        scale(exponent_scale<Real>(temperature)) {}

  WINNOW_DEVICE double weight(int64_t index, Real x, Real y) const {
    if (index == excluded) return 0.0;
    const Real p = exp2_of((x - target_reference) * scale) * target_share;
    if (draft < 0) return static_cast<double>(p);
    const Real q = exp2_of((y - draft_reference) * scale) * draft_share;
    return p > q ? static_cast<double>(p - q) : 0.0;
  }

  WINNOW_DEVICE double weight_at(int64_t index) const {
    if (index >= models.target.vocab) return 0.0;
    const Real x = plain_logit(models.target, target, index);
    return weight(index, x, draft < 0 ? Real(0) : plain_logit(models.draft, draft, index));
  }

  // Of a slice; all threads get it.
  WINNOW_DEVICE double mass(int64_t slice, Shared<double> scratch) const {
    double mass = 0.0;
    for (int64_t i = slice * kSlice + thread_index(); i < (slice + 1) * kSlice; i += kThreads) {
      mass += weight_at(i);
    }
    return block_reduce<kThreads>(mass, scratch, [](double a, double b) { return a + b; });
  }

  // The same, with all reads under way at once.
  WINNOW_DEVICE double slice_mass(int64_t slice, Shared<double> scratch) const {
    Real x[kPerThread];
    Real y[kPerThread];
    load_plain_slice(models.target, target, slice, x);
    if (draft >= 0) load_plain_slice(models.draft, draft, slice, y);
    double mass = 0.0;
#pragma unroll
    for (int e = 0; e < kPerThread; ++e) {
      mass += weight(slice * kSlice + within_slice<Real>(e), x[e], draft >= 0 ? y[e] : Real(0));
    }
    return block_reduce<kThreads>(mass, scratch, [](double a, double b) { return a + b; });
  }

  // The token of a slice at which the cumulated weight exceeds uniform times the whole.
  WINNOW_DEVICE int64_t draw(int64_t slice, double uniform, Shared<double> scratch,
                             Shared<int64_t> index_scratch) const {
    return draw_index<kPerThread>(
        slice * kSlice, uniform, [&](int64_t i) { return weight_at(i); }, scratch, index_scratch);
  }
};

template <typename Real>
WINNOW_KERNEL(kThreads)
sum_residuals(Models<Real> models, Steps steps, Global<const SliceSums> sums,
              Global<double> masses) {
  WINNOW_SHARED(TopTwo, top_scratch, kThreads / kWarp);
  WINNOW_SHARED(Sums, sum_scratch, kThreads / kWarp);
  WINNOW_SHARED(double, mass_scratch, kThreads / kWarp);
  const int64_t b = block_index();
  const Verdict verdict = walk(models, steps, b, sums, Shared<TopTwo>(top_scratch),
                               Shared<Sums>(sum_scratch), [](int64_t, int64_t, double) {});
  if (verdict.step < 0 || verdict.lost) return;
  const double mass = Residual<Real>(models, verdict, steps.temperature)
                          .slice_mass(block_index_y(), Shared<double>(mass_scratch));
  if (thread_index() == 0) {
    masses[b * ceil_div<int64_t>(models.target.vocab, kSlice) + block_index_y()] = mass;
  }
}

template <typename Real>
struct VerificationOutputs {
  Global<int64_t> accepted;
  Global<int64_t> token;
  Global<int64_t> tokens;
  Global<Real> log_prob;
};

template <typename Real>
WINNOW_KERNEL(kThreads)
finish_verification(Models<Real> models, Steps steps, Global<const SliceSums> sums,
                    Global<const double> masses, VerificationOutputs<Real> out) {
  WINNOW_SHARED(TopTwo, top_scratch, kThreads / kWarp);
  WINNOW_SHARED(Sums, sum_scratch, kThreads / kWarp);
  WINNOW_SHARED(Clock, clock_scratch, kThreads / kWarp);
  WINNOW_SHARED(double, mass_scratch, kThreads / kWarp);
  WINNOW_SHARED(int64_t, index_scratch, kThreads / kWarp);
  const int64_t b = block_index();
  const bool writes = thread_index() == 0;
  const auto put = [&](int64_t step, int64_t token, double log_p) {
    if (!writes) return;
    out.tokens[b * steps.steps + step] = token;
    out.log_prob[b * steps.steps + step] = static_cast<Real>(log_p);
  };
  Verdict verdict =
      walk(models, steps, b, sums, Shared<TopTwo>(top_scratch), Shared<Sums>(sum_scratch), put);
  int64_t token = -1;
  int64_t known = verdict.accepted;
  if (verdict.lost) {
    put(known++, -1, std::numeric_limits<double>::quiet_NaN());
  } else if (verdict.step >= 0) {
    token = verdict.target_distribution.top.argmax;
    if (!steps.greedy) {
      const int64_t slices = ceil_div<int64_t>(models.target.vocab, kSlice);
      Residual<Real> residual(models, verdict, steps.temperature);
      Clock clock = {0.0, -1, 0.0};
      const auto enter = [&](int64_t s, double mass) {
        if (!(mass > 0.0)) return;
        const uint64_t element =
            static_cast<uint64_t>(verdict.step) * kStepKey + static_cast<uint64_t>(s * kSlice);
        clock = earlier(clock, clock_of(steps.seed, b, element, s, log(mass)));
      };
      for (int64_t s = thread_index(); s < slices; s += kThreads) enter(s, masses[b * slices + s]);
      clock = block_reduce<kThreads>(clock, Shared<Clock>(clock_scratch), earlier);
      if (clock.block < 0) {
        // The two distributions are equal but for rounding, which rejected the draft: any token of
        // the target will do.
        residual.draft = -1;
        residual.excluded = -1;
        for (int64_t s = 0; s < slices; ++s) {
          enter(s, residual.mass(s, Shared<double>(mass_scratch)));
        }
      }
      token = residual.draw(clock.block, clock.uniform, Shared<double>(mass_scratch),
                            Shared<int64_t>(index_scratch));
    }
    put(known++, token,
        log_prob_of(verdict.target_distribution,
                    static_cast<double>(plain_logit(models.target, verdict.target, token)),
                    steps.temperature));
  }
  if (!writes) return;
  out.accepted[b] = verdict.accepted;
  out.token[b] = token;
  for (; known < steps.steps; ++known) put(known, -1, 0.0);
}

}  // namespace
}  // namespace winnow
