// Gradients of slots from the sums of the backward's splits.
#include "attention/attention_backward_simd.h"
#include "attention/element_rows.h"
#include "attention/gradient_splits.h"
#include "common/dispatch_simd.h"

namespace winnow::CPU_CAPABILITY {
namespace {

// grad_slot[m] = sum over splits, in order.
template <typename T, typename Acc>
void sum_splits(const BackwardProblem& problem, int64_t unit) {
  const Pattern& pattern = problem.forward.pattern;
  const int64_t dim = problem.forward.dim;
  const int64_t ld = padded_dim(dim);
  for (int kind = 0; kind < 2; ++kind) {
    void* interleaved = kind == 0 ? problem.grad_key : problem.grad_value;
    void* separate = kind == 0 ? problem.grad_slot_key : problem.grad_slot_value;
    for (int64_t slot = 0; slot < pattern.slots; ++slot) {
      alignas(64) Acc sum[padded_dim(256)] = {};
      for (int64_t index = 0; index < problem.splits; ++index) {
        const Split split = split_of(pattern, index, problem.splits);
        if (slot < split.slot_begin || slot >= split.slot_end) continue;
        const Acc* part =
            static_cast<const Acc*>(problem.slot_sums) +
            (((unit * problem.splits + index) * 2 + kind) * pattern.slots + slot) * ld;
        for (int64_t d = 0; d < dim; ++d) sum[d] += part[d];
      }
      T* place = pattern.interleaved
                     ? static_cast<T*>(interleaved) +
                           (unit * pattern.rows + slot * pattern.chunk_size) * dim
                     : static_cast<T*>(separate) + (unit * pattern.slots + slot) * dim;
      store_row(sum, dim, place);
    }
  }
}

}  // namespace

void slot_gradients(const BackwardProblem& problem, int64_t unit_begin, int64_t unit_end) {
  dispatch_element(problem.forward.type, [&](auto zero) {
    using T = decltype(zero);
    using Acc = std::conditional_t<std::is_same_v<T, double>, double, float>;
    for (int64_t unit = unit_begin; unit < unit_end; ++unit) sum_splits<T, Acc>(problem, unit);
  });
}

}  // namespace winnow::CPU_CAPABILITY
