// out = sum_p w_p out_p with w_p = exp(lse_p - lse) and lse = log sum_p exp(lse_p). A part that saw
// nothing (lse = -inf) has no weight and its row is not read.
#include "attention/merge_attention_simd.h"

#include <cmath>
#include <limits>
#include <type_traits>

#include "attention/element_rows.h"
#include "common/dispatch_simd.h"

namespace winnow::CPU_CAPABILITY {
namespace {

constexpr int64_t kPiece = 64;  // columns at a time, in float (double)

template <typename T, typename Acc>
class Merge {
 public:
  explicit Merge(const MergeProblem& problem) : problem_(problem) {}

  void row(int64_t r) const {
    Acc top = kNone;
    for (int64_t p = 0; p < problem_.parts; ++p) {
      const Acc lse = part_lse(p, r);
      top = lse > top || lse != lse ? lse : top;
      if (top != top) break;
    }
    Acc sum = 0;
    for (int64_t p = 0; p < problem_.parts && top != kNone; ++p) {
      sum += std::exp(part_lse(p, r) - top);
    }
    const Acc lse = top == kNone ? kNone : top + std::log(sum);
    *lse_of(problem_.merged, r) = lse;
    for (int64_t d = 0; d < problem_.dim; d += kPiece) {
      const int64_t count = piece(d);
      alignas(64) Acc total[kPiece] = {};
      alignas(64) Acc x[kPiece];
      for (int64_t p = 0; p < problem_.parts; ++p) {
        if (part_lse(p, r) == kNone) continue;
        const Acc weight = std::exp(part_lse(p, r) - lse);
        load(problem_.part[p], r, d, count, x);
        for (int64_t i = 0; i < kPiece; ++i) total[i] += weight * x[i];
      }
      store(problem_.merged, r, d, count, total);
    }
  }

  // d out_p = w_p d out, d lse_p = w_p (d out . (out_p - out) + d lse)
  void backward_row(int64_t r) const {
    alignas(64) Acc grad[kPiece];
    alignas(64) Acc x[kPiece];
    alignas(64) Acc out[kPiece];
    const Acc lse = *lse_of(problem_.merged, r);
    for (int64_t p = 0; p < problem_.parts; ++p) {
      const bool seen = part_lse(p, r) != kNone;
      const Acc weight = seen ? std::exp(part_lse(p, r) - lse) : Acc(0);
      Acc sum = 0;
      for (int64_t d = 0; d < problem_.dim; d += kPiece) {
        const int64_t count = piece(d);
        for (Acc& value : x) value = 0;
        if (seen) {
          load(problem_.grad, r, d, count, grad);
          load(problem_.part[p], r, d, count, x);
          load(problem_.merged, r, d, count, out);
          for (int64_t i = 0; i < kPiece; ++i) {
            sum += grad[i] * (x[i] - out[i]);
            x[i] = weight * grad[i];
          }
        }
        store(problem_.part_grad[p], r, d, count, x);
      }
      *lse_of(problem_.part_grad[p], r) =
          seen ? weight * (sum + *lse_of(problem_.grad, r)) : Acc(0);
    }
  }

 private:
  static constexpr Acc kNone = -std::numeric_limits<Acc>::infinity();

  int64_t piece(int64_t d) const { return problem_.dim - d < kPiece ? problem_.dim - d : kPiece; }
  static Acc* lse_of(const MergeRows& rows, int64_t r) {
    return static_cast<Acc*>(rows.lse) + r * rows.lse_stride;
  }
  Acc part_lse(int64_t p, int64_t r) const { return *lse_of(problem_.part[p], r); }
  static void load(const MergeRows& rows, int64_t r, int64_t d, int64_t count, Acc* x) {
    load_rows(static_cast<const T*>(rows.out) + r * rows.out_stride + d, 0, 1, count, x, kPiece);
    for (int64_t i = (count + kLanes - 1) / kLanes * kLanes; i < kPiece; ++i) x[i] = 0;
  }
  static void store(const MergeRows& rows, int64_t r, int64_t d, int64_t count, const Acc* x) {
    store_row(x, count, static_cast<T*>(rows.out) + r * rows.out_stride + d);
  }

  const MergeProblem& problem_;
};

template <typename Fn>
void with_merge(const MergeProblem& problem, const Fn& fn) {
  dispatch_element(problem.type, [&](auto zero) {
    using T = decltype(zero);
    fn(Merge<T, std::conditional_t<std::is_same_v<T, double>, double, float>>(problem));
  });
}

}  // namespace

void merge_attention_rows(const MergeProblem& problem, int64_t row_begin, int64_t row_end) {
  with_merge(problem, [&](const auto& merge) {
    for (int64_t r = row_begin; r < row_end; ++r) merge.row(r);
  });
}

void merge_attention_backward_rows(const MergeProblem& problem, int64_t row_begin,
                                   int64_t row_end) {
  with_merge(problem, [&](const auto& merge) {
    for (int64_t r = row_begin; r < row_end; ++r) merge.backward_row(r);
  });
}

}  // namespace winnow::CPU_CAPABILITY
