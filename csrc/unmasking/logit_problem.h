// The checked problem of an operator that measures logits on the CPU.
#pragma once

#include <cstdint>
#include <vector>

#include "unmasking/logit_arguments.h"
#include "unmasking/logit_rows.h"

namespace winnow {

// Everything that the loops are told.
struct LogitProblem {
  LogitArguments arguments;
  uint64_t seed;
  LogitRows view;
  LogitRows previous_view;
  std::vector<int64_t> suppressed;  // what the views point to
  std::vector<int64_t> active;      // the rows to measure, ascending
  std::vector<int64_t> sources;     // where the logits of each are

  const LogitRows* previous() const { return arguments.previous ? &previous_view : nullptr; }
  const int64_t* target_of(int64_t row) const {
    const auto& target = arguments.target;
    return target ? static_cast<const int64_t*>(target->data_ptr()) + row : nullptr;
  }
  int64_t key_of(int64_t row) const {
    const auto& keys = arguments.keys;
    return keys ? static_cast<const int64_t*>(keys->data_ptr())[row] : row;
  }
};

// All but the rows. Views point into the problem: it must not be moved. `also_suppressed`: one more
// id, ignored outside of the vocabulary.
void prepare(const LogitRequest& call, LogitProblem& problem, int64_t also_suppressed = -1);

// All rows are active, or those of the mask. Once the results have memory: what is too much for any
// is refused at once then, and not row by row.
void list_rows(LogitProblem& problem);

// Logits that nothing is applied to.
LogitRows plain_rows(const Rows& rows);

// A number that the host reads.
uint64_t seed_on_cpu(const Tensor& seed);

}  // namespace winnow
