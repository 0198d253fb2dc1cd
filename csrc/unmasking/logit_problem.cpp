// From the arguments of an operator that measures logits to what the CPU's loops are told.
#include "unmasking/logit_problem.h"

#include <algorithm>

namespace winnow {
namespace {

// Of this part of the vocabulary, ascending. `also` is ignored where it is no id.
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

}  // namespace

LogitRows plain_rows(const Rows& rows) {
  LogitRows view = {};
  view.logits = rows.tensor.data_ptr();
  view.stride = rows.stride;
  view.type = element_type(rows.tensor);
  view.vocab = rows.length;
  return view;
}

void prepare(const LogitRequest& call, LogitProblem& problem, int64_t also_suppressed) {
  problem.arguments = check_logit_arguments(call, check_cpu);
  const LogitArguments& arguments = problem.arguments;
  const Rows& rows = arguments.rows;
  LogitRows& view = problem.view;
  view = plain_rows(rows);
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
}

void list_rows(LogitProblem& problem) {
  const LogitArguments& arguments = problem.arguments;
  const Rows& rows = arguments.rows;
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

}  // namespace winnow
