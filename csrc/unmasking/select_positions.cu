// winnow::select_positions on the GPU. A block per row: every masked position in the window counts
// the ones before it in the rule's order, and the entropy that they hold, by looking at all of
// them, tile by tile through shared memory. The rule then follows from these ranks by one
// reduction; nothing is sorted. Windows are hundreds of positions, so the square of their length
// costs microseconds.
#include <optional>
#include <tuple>

#include "common/device.h"
#include "common/philox.h"
#include "unmasking/selection_arguments.h"

namespace winnow {
namespace {

constexpr int kThreads = 256;

struct Selection {
  Global<const bool> mask;
  Global<const int64_t> window;    // or null
  Global<const int64_t> at_least;  // or null
  Seed seed;
  Rule rule;
  int64_t length;
  Global<int64_t> rank;      // (B, L): in the rule's order, NaNs last
  Global<int64_t> leftmost;  // (B, L): from left to right, for that order alone
  Global<bool> transfer;
  Global<int64_t> count;
};

struct Place {
  double score;
  uint64_t lot;  // for the random order
  int64_t position;
};

// NaNs come last; of equals the lower position is first.
WINNOW_DEVICE bool comes_before(const Place& a, const Place& b, Order order) {
  const bool a_nan = a.score != a.score;
  const bool b_nan = b.score != b.score;
  if (a_nan != b_nan) return b_nan;
  if (!a_nan) {
    if (order == kLowestFirst && a.score != b.score) return a.score < b.score;
    if (order == kHighestFirst && a.score != b.score) return a.score > b.score;
    if (order == kRandom && a.lot != b.lot) return a.lot < b.lot;
  }
  return a.position < b.position;
}

// Whether the rule takes a position that has `rank` others before it, whose scores sum to `before`.
// Both sides in the dtype of the scores: a float32 score of 0.9 meets a threshold of 0.9.
template <typename T>
WINNOW_DEVICE bool meets(const Rule& rule, double score, double before) {
  const T threshold = static_cast<T>(rule.threshold);
  switch (rule.criterion) {
    case kBelow:
      return score < static_cast<double>(threshold);
    case kAtLeast:
      return score >= static_cast<double>(threshold);
    case kEntropyBound:
      return score == score && static_cast<T>(before) <= threshold;
    default:
      return true;  // a number of tokens takes NaNs too, last
  }
}

template <typename T>
WINNOW_KERNEL(kThreads)
select_rows(Global<const T> scores, Selection call) {
  WINNOW_SHARED(Place, tile, kThreads);
  WINNOW_SHARED(int64_t, scratch, kThreads / kWarp);
  const int64_t row = block_index();
  const auto score = scores + row * call.length;
  const auto mask = call.mask + row * call.length;
  const auto rank = call.rank + row * call.length;
  const auto leftmost = call.leftmost + row * call.length;
  const Rule rule = call.rule;
  int64_t start = 0;
  int64_t end = call.length;
  if (call.window) {
    const int64_t first = call.window[2 * row];
    const int64_t last = call.window[2 * row + 1];
    start = first > 0 ? first : 0;
    end = last < call.length ? last : call.length;
  }
  const auto place = [&](int64_t l) {
    Place p = {0.0, 0, -1};  // no candidate
    if (l >= end) return p;
    const bool masked = mask[l];
    if (!masked) return p;
    p.score = static_cast<double>(static_cast<T>(score[l]));
    p.position = l;
    if (rule.order == kRandom) {
      p.lot = philox_bits(call.seed.get() ^ kLotKey, static_cast<uint64_t>(row),
                          static_cast<uint64_t>(l));
    }
    return p;
  };

  // The first rank that the rule does not take, or for ConfidenceFactor the last one that it does.
  const int64_t never = int64_t{1} << 62;
  int64_t candidates = 0;
  int64_t first_refused = never;
  int64_t taken = 0;
  for (int64_t mine = start; mine < end; mine += kThreads) {
    const int64_t l = mine + thread_index();
    const Place own = place(l);
    int64_t before = 0;
    int64_t left = 0;
    double sum = 0.0;
    for (int64_t other = start; other < end; other += kThreads) {
      block_sync();
      tile[thread_index()] = place(other + thread_index());
      block_sync();
      for (int j = 0; j < kThreads && other + j < end; ++j) {
        const Place p = tile[j];
        if (p.position < 0 || own.position < 0) continue;
        if (comes_before(p, own, rule.order)) {
          ++before;
          sum += p.score;
        }
        if (p.position < own.position) ++left;
      }
    }
    if (own.position < 0) continue;
    ++candidates;
    rank[l] = before;
    leftmost[l] = left;
    // A left-to-right run ends at a NaN, wherever it stands.
    const int64_t at = rule.order == kLeftToRight ? left : before;
    if (rule.criterion == kConfidenceFactor) {
      const double bound = static_cast<double>(at + 2) * (1.0 - own.score);
      if (static_cast<T>(bound) < static_cast<T>(rule.threshold) && at + 1 > taken) taken = at + 1;
    } else if (!meets<T>(rule, own.score, sum) && at < first_refused) {
      first_refused = at;
    }
  }
  const auto least = [](int64_t a, int64_t b) { return a < b ? a : b; };
  const auto most = [](int64_t a, int64_t b) { return a > b ? a : b; };
  const auto plus = [](int64_t a, int64_t b) { return a + b; };
  candidates = block_reduce<kThreads>(candidates, Shared<int64_t>(scratch), plus);
  first_refused = block_reduce<kThreads>(first_refused, Shared<int64_t>(scratch), least);
  taken = block_reduce<kThreads>(taken, Shared<int64_t>(scratch), most);

  int64_t count = rule.criterion == kConfidenceFactor ? taken : least(first_refused, candidates);
  if (rule.limit >= 0) count = least(count, rule.limit);
  int64_t floor = 1;
  if (call.at_least) {
    const int64_t wanted = call.at_least[row];
    floor = most(wanted, 1);
  }
  floor = least(floor, candidates);
  const bool runs = rule.order == kLeftToRight && count >= floor;
  count = most(count, floor);
  for (int64_t l = thread_index(); l < call.length; l += kThreads) {
    bool takes = false;
    if (l >= start && l < end) {
      const bool masked = mask[l];
      if (masked) {
        const int64_t at = runs ? leftmost[l] : rank[l];
        takes = at < count;
      }
    }
    call.transfer[row * call.length + l] = takes;
  }
  if (thread_index() == 0) call.count[row] = count;
}

// ---- launcher ----

std::tuple<Tensor, Tensor> select_positions_cuda(const Tensor& score, const Tensor& mask,
                                                 int64_t order, int64_t criterion, double threshold,
                                                 int64_t limit, const std::optional<Tensor>& window,
                                                 const std::optional<Tensor>& at_least,
                                                 const std::optional<Tensor>& seed) {
  const SelectionArguments checked = check_selection(score, mask, window, at_least, check_device);
  const int64_t batch = score.size(0);
  const int64_t length = score.size(1);
  const Stream stream(score);
  const Tensor transfer = empty({batch, length}, ScalarType::Bool, score);
  const Tensor count = empty({batch}, ScalarType::Long, score);
  const Tensor rank = empty({2, batch, length}, ScalarType::Long, score);

  Selection call = {};
  call.mask = global<const bool>(checked.mask);
  if (checked.window) call.window = global<const int64_t>(*checked.window);
  if (checked.at_least) call.at_least = global<const int64_t>(*checked.at_least);
  if (seed) call.seed = seed_of(*seed);
  call.rule = make_rule(order, criterion, threshold, limit);
  call.length = length;
  call.rank = global<int64_t>(rank);
  call.leftmost = global<int64_t>(rank) + batch * length;
  call.transfer = global<bool>(transfer);
  call.count = global<int64_t>(count);
  if (score.scalar_type() == ScalarType::Double) {
    launch("select_positions", select_rows<double>, {batch}, kThreads, stream,
           global<const double>(checked.score), call);
  } else {
    launch("select_positions", select_rows<float>, {batch}, kThreads, stream,
           global<const float>(checked.score), call);
  }
  return {transfer, count};
}

}  // namespace
}  // namespace winnow

WINNOW_DEVICE_OPERATORS(m) {
  m.impl("select_positions", TORCH_BOX(&winnow::select_positions_cuda));
}
