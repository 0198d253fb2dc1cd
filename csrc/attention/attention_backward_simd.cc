// Gradients in one pass over tiles of 64 query rows by up to 64 keys: weights are recomputed from
// the saved lse, then
//   dV += P^T dO,  dS = P * (dO V^T - delta) * scale,  dK += dS^T Q,  dQ += dS K
// with delta = rowsum(dO * O) - dlse. Local key gradients live in a window that follows the rows,
// slot gradients in one buffer per split. No atomics; see BackwardProblem for the order of sums.
#include "attention/attention_backward_simd.h"

#include <limits>

#include "attention/gradient_window.h"
#include "attention/key_tile.h"
#include "attention/operands.h"
#include "attention/scratch.h"
#include "common/dispatch_simd.h"

namespace winnow::CPU_CAPABILITY {
namespace {

constexpr double kLog2E = 1.4426950408889634;

// Rows and slots of a split.
struct Split {
  int64_t row_begin, row_end;
  int64_t slot_begin, slot_end;
};

inline int64_t split_row(const Pattern& pattern, int64_t split, int64_t splits) {
  if (split == splits) return pattern.rows;
  return chunk_of(pattern, pattern.rows / splits * split + pattern.rows % splits * split / splits)
      .begin;
}

inline Split split_of(const Pattern& pattern, int64_t index, int64_t splits) {
  Split split{split_row(pattern, index, splits), split_row(pattern, index + 1, splits), 0, 0};
  if (split.row_begin < split.row_end && pattern.slots > 0) {
    const Chunk last = chunk_of(pattern, split.row_end - 1);
    split.slot_begin = chunk_of(pattern, split.row_begin).slot_begin;
    split.slot_end = larger(split.slot_begin, last.slot_end);
    if (pattern.interleaved) split.slot_end = (split.row_end - 1) / pattern.chunk_size + 1;
  }
  return split;
}

// A copy with zeros for what is not finite: in a product over keys that some lanes don't see, zero
// weight times NaN would be NaN.
template <typename Acc>
inline void copy_finite(const Acc* src, int64_t count, Acc* dst) {
  for (int64_t i = 0; i < count; ++i) dst[i] = src[i] * Acc(0) == Acc(0) ? src[i] : Acc(0);
}

template <typename T, class Math>
class Backward {
  using Acc = typename Math::Acc;
  using Vec = typename Math::Vec;
  static constexpr int kSize = Vec::size();

 public:
  Backward(const BackwardProblem& problem, void* memory)
      : problem_(problem),
        forward_(problem.forward),
        pattern_(problem.forward.pattern),
        dim_(problem.forward.dim),
        ld_(padded_dim(problem.forward.dim)) {
    Scratch scratch(memory);
    for (Acc** tile : {&query_, &query_lanes_, &finite_query_, &grad_, &grad_lanes_, &finite_grad_,
                       &out_, &grad_query_, &key_, &value_, &finite_key_}) {
      *tile = scratch.take<Acc>(kTile * ld_);
    }
    weights_ = scratch.take<Acc>(kTile * kTile);
    grad_scores_ = scratch.take<Acc>(kTile * kTile);
    window_.attach(scratch, window_rows(pattern_), ld_);
  }

  void unit(int64_t index) {
    const int64_t kv_heads = forward_.kv_heads;
    batch_ = index / problem_.splits / kv_heads;
    kv_head_ = index / problem_.splits % kv_heads;
    split_ = split_of(pattern_, index % problem_.splits, problem_.splits);
    if (split_.row_begin == split_.row_end) return;
    slot_key_sums_ = static_cast<Acc*>(problem_.slot_sums) + index * 2 * pattern_.slots * ld_;
    slot_value_sums_ = slot_key_sums_ + pattern_.slots * ld_;
    for (int64_t i = split_.slot_begin * ld_; i < split_.slot_end * ld_; ++i) {
      slot_key_sums_[i] = 0;
      slot_value_sums_[i] = 0;
    }
    window_.restart(split_.row_begin);

    const int64_t group = forward_.query_heads / kv_heads;
    const auto tile_of_heads = [&](int64_t row, int64_t count, bool own) {
      const int64_t reach = pattern_.causal ? row + count : chunk_of(pattern_, row + count - 1).end;
      finish_rows(chunk_of(pattern_, row).local_begin);
      window_.extend(smaller(reach, split_.row_end));
      for (int64_t h = 0; h < group; ++h) tile(kv_head_ * group + h, row, count, own);
    };
    for (int64_t row = split_.row_begin; row < split_.row_end; row += kTile) {
      tile_of_heads(row, smaller(kTile, split_.row_end - row), true);
    }
    // Rows of later splits that look back at this one's keys.
    for (int64_t row = split_.row_end; row < pattern_.rows; row += kTile) {
      if (chunk_of(pattern_, row).local_begin >= split_.row_end) break;
      tile_of_heads(row, smaller(kTile, pattern_.rows - row), false);
    }
    finish_rows(split_.row_end);
  }

 private:
  // Rows before `row` receive no further gradient.
  void finish_rows(int64_t row) {
    row = smaller(row, window_.end());
    const int64_t head_rows = (batch_ * forward_.kv_heads + kv_head_) * pattern_.rows;
    for (int64_t r = window_.begin(); r < row; ++r) {
      if (pattern_.interleaved && r % pattern_.chunk_size == 0) {
        const int64_t slot = r / pattern_.chunk_size * ld_;
        for (int64_t d = 0; d < ld_; ++d) {
          slot_key_sums_[slot + d] += window_.key(r)[d];
          slot_value_sums_[slot + d] += window_.value(r)[d];
        }
        continue;
      }
      const int64_t place = (head_rows + r) * dim_;
      store_row(window_.key(r), dim_, static_cast<T*>(problem_.grad_key) + place);
      store_row(window_.value(r), dim_, static_cast<T*>(problem_.grad_value) + place);
    }
    window_.drop_before(row);
  }

  const T* rows_of(const Source& source, int64_t head) const {
    return static_cast<const T*>(source.data) + batch_ * source.batch + head * source.head;
  }

  void tile(int64_t head, int64_t row, int64_t count, bool own) {
    load_queries(head, row, count);
    see_rows(row, count);
    for (int64_t i = 0; i < ld_ * kTile; ++i) grad_query_[i] = 0;
    if (own) {
      attend(slots_, forward_.slot_key, forward_.slot_value, slot_key_sums_, slot_value_sums_,
             true);
      // Keys of earlier splits: their own split accumulates them.
      PlaceRanges<kSize> earlier;
      clip(locals_, 0, split_.row_begin, &earlier);
      attend(earlier, forward_.key, forward_.value, nullptr, nullptr, true);
    }
    clip(locals_, split_.row_begin, split_.row_end, &locals_);
    attend(locals_, forward_.key, forward_.value, window_.key(0), window_.value(0), own);
    if (!own) return;
    transpose_tile(grad_query_, kTile, ld_, kTile, out_, ld_);
    const int64_t first = (batch_ * forward_.query_heads + head) * pattern_.rows + row;
    for (int64_t lane = 0; lane < count; ++lane) {
      store_row(out_ + lane * ld_, dim_,
                static_cast<T*>(problem_.grad_query) + (first + lane) * dim_);
    }
  }

  void see_rows(int64_t row, int64_t count) {
    Chunk chunk{0, 0, 0, 0, 0};
    for (int64_t lane = 0; lane < kTile; ++lane) {
      const int64_t t = row + lane;
      if (lane >= count) {
        slots_.place[lane] = locals_.place[lane] = {};
        continue;
      }
      if (lane == 0 || t >= chunk.end) chunk = chunk_of(pattern_, t);
      slots_.place[lane] = {chunk.slot_begin, chunk.slot_end};
      locals_.place[lane] = {chunk.local_begin, pattern_.causal ? t + 1 : chunk.end};
    }
    slots_.bound(kTile / kSize);
  }

  static void clip(const PlaceRanges<kSize>& ranges, int64_t begin, int64_t end,
                   PlaceRanges<kSize>* clipped) {
    for (int lane = 0; lane < kTile; ++lane) {
      clipped->place[lane] = {larger(ranges.place[lane].begin, begin),
                              smaller(ranges.place[lane].end, end)};
    }
    clipped->bound(kTile / kSize);
  }

  void load_queries(int64_t head, int64_t row, int64_t count) {
    const Source& q = forward_.query;
    const Source& g = problem_.grad_out;
    const int64_t first = (batch_ * forward_.query_heads + head) * pattern_.rows + row;
    query_is_finite_ = load_rows(rows_of(q, head) + row * q.row, q.row, count, dim_, query_, ld_);
    grad_is_finite_ = load_rows(rows_of(g, head) + row * g.row, g.row, count, dim_, grad_, ld_);
    load_rows(static_cast<const T*>(problem_.out) + first * dim_, dim_, count, dim_, out_, ld_);
    for (int64_t i = count * ld_; i < kTile * ld_; ++i) query_[i] = grad_[i] = 0;
    transpose_tile(query_, ld_, kTile, ld_, query_lanes_, kTile);
    transpose_tile(grad_, ld_, kTile, ld_, grad_lanes_, kTile);
    if (!query_is_finite_) copy_finite(query_, kTile * ld_, finite_query_);
    if (!grad_is_finite_) copy_finite(grad_, kTile * ld_, finite_grad_);

    const Acc* lse = static_cast<const Acc*>(problem_.lse) + first;
    const Acc* grad_lse =
        problem_.grad_lse ? static_cast<const Acc*>(problem_.grad_lse) + first : nullptr;
    for (int lane = 0; lane < kTile; ++lane) {
      lse_[lane] = 0;
      delta_[lane] = 0;
      if (lane >= count) continue;
      // A row that attends nothing has weights exp2(score - inf) = 0.
      constexpr Acc kInfinity = std::numeric_limits<Acc>::infinity();
      lse_[lane] = lse[lane] == -kInfinity ? kInfinity : lse[lane] * Acc(kLog2E);
      Vec sum(Acc(0));
      for (int64_t d = 0; d < ld_; d += kSize) {
        sum = at::vec::fmadd(Vec::loadu(grad_ + lane * ld_ + d), Vec::loadu(out_ + lane * ld_ + d),
                             sum);
      }
      Acc part[kSize];
      sum.store(part);
      for (int i = 0; i < kSize; ++i) delta_[lane] += part[i];
      if (grad_lse) delta_[lane] -= grad_lse[lane];
    }
  }

  // key_sums, value_sums: where the gradient of key 0 would lie, or null.
  void attend(const PlaceRanges<kSize>& ranges, const Source& key, const Source& value,
              Acc* key_sums, Acc* value_sums, bool queries) {
    const auto [first, last] = union_of(ranges.some, kTile / kSize);
    const T* keys = rows_of(key, kv_head_);
    const T* values = rows_of(value, kv_head_);
    for (int64_t j = first; j < last; j += kTile) {
      const int64_t count = smaller(kTile, last - j);
      const TileMask<Math> mask(ranges, 0, kTile / kSize, j, count);
      key_is_finite_ = load_rows(keys + j * key.row, key.row, count, dim_, key_, ld_);
      load_rows(values + j * value.row, value.row, count, dim_, value_, ld_);
      if (!key_is_finite_) copy_finite(key_, count * ld_, finite_key_);
      for (int g = 0; g < mask.count; ++g) {
        with_constant<kMaxWidth>(mask.groups[g].width, [&](auto width) {
          group<decltype(width)::value>(mask, mask.groups[g],
                                        key_sums ? key_sums + j * ld_ : nullptr,
                                        value_sums ? value_sums + j * ld_ : nullptr, queries);
        });
      }
    }
  }

  template <int W>
  void group(const TileMask<Math>& mask, const Group& group, Acc* key_sums, Acc* value_sums,
             bool queries) {
    constexpr int kLanesWide = W * kSize;
    const int lane = group.vector * kSize;
    const int keys = group.end - group.begin;
    const int64_t first = group.begin * ld_;
    const Acc scale = static_cast<Acc>(forward_.scale * kLog2E);
    const Acc one(1);
    product<Math, Into::kScaled, W>(keys, {key_ + first, ld_, 1}, query_lanes_ + lane, kTile, dim_,
                                    weights_, kLanesWide, &scale);
    product<Math, Into::kScaled, W>(keys, {value_ + first, ld_, 1}, grad_lanes_ + lane, kTile, dim_,
                                    grad_scores_, kLanesWide, &one);
    for (int w = 0; w < W; ++w) {
      weights(mask, group, group.vector + w, weights_ + w * kSize, grad_scores_ + w * kSize,
              kLanesWide);
    }
    if (value_sums) {
      const Acc* grad = grad_is_finite_ ? grad_ : finite_grad_;
      product_columns<Math, Into::kAdded>({weights_, kLanesWide, 1}, grad + lane * ld_, ld_,
                                          kLanesWide, ld_, value_sums + first, ld_, nullptr, keys);
      if (!grad_is_finite_)
        add_nonfinite_rows(mask, group, kLanesWide, weights_, grad_, value_sums);
      const Acc* query = query_is_finite_ ? query_ : finite_query_;
      product_columns<Math, Into::kAdded>({grad_scores_, kLanesWide, 1}, query + lane * ld_, ld_,
                                          kLanesWide, ld_, key_sums + first, ld_, nullptr, keys);
      if (!query_is_finite_) {
        add_nonfinite_rows(mask, group, kLanesWide, grad_scores_, query_, key_sums);
      }
    }
    if (queries) {
      const Acc* key = (key_is_finite_ ? key_ : finite_key_) + first;
      product<Math, Into::kAdded, W>(dim_, {key, 1, ld_}, grad_scores_, kLanesWide, keys,
                                     grad_query_ + lane, kTile, nullptr);
      if (!key_is_finite_) add_nonfinite_keys(mask, group, kLanesWide);
    }
  }

  // Scores and dO V^T of one vector of lanes become weights and score gradients.
  void weights(const TileMask<Math>& mask, const Group& group, int v, Acc* weights, Acc* grads,
               int64_t ld) const {
    const Vec lse = Vec::loadu(lse_ + v * kSize);
    const Vec delta = Vec::loadu(delta_ + v * kSize);
    const Vec scale(static_cast<Acc>(forward_.scale));
    const Vec none(Acc(0));
    const bool full = group.full_begin <= group.begin && group.end <= group.full_end;
    const typename TileMask<Math>::Lanes lanes(mask, v);
    for (int j = group.begin; j < group.end; ++j) {
      const int64_t place = (j - group.begin) * ld;
      Vec p = exp2_lanes(Vec::loadu(weights + place) - lse);
      Vec grad = p * (Vec::loadu(grads + place) - delta) * scale;
      if (!full) {
        p = lanes.where_seen(j, p, none);
        grad = lanes.where_seen(j, grad, none);
      }
      p.store(weights + place);
      grad.store(grads + place);
    }
  }

  // sums[key] += weight[key][lane] * x[lane] for what copy_finite left out of x.
  void add_nonfinite_rows(const TileMask<Math>& mask, const Group& group, int lanes,
                          const Acc* weight, const Acc* x, Acc* sums) const {
    for (int i = 0; i < lanes; ++i) {
      const int lane = group.vector * kSize + i;
      for (int64_t d = 0; d < dim_; ++d) {
        const Acc value = x[lane * ld_ + d];
        if (value * Acc(0) == Acc(0)) continue;
        for (int j = group.begin; j < group.end; ++j) {
          if (mask.lane_sees(lane, j)) {
            sums[j * ld_ + d] += weight[(j - group.begin) * lanes + i] * value;
          }
        }
      }
    }
  }

  void add_nonfinite_keys(const TileMask<Math>& mask, const Group& group, int lanes) {
    for (int j = group.begin; j < group.end; ++j) {
      for (int64_t d = 0; d < dim_; ++d) {
        const Acc value = key_[j * ld_ + d];
        if (value * Acc(0) == Acc(0)) continue;
        for (int i = 0; i < lanes; ++i) {
          const int lane = group.vector * kSize + i;
          if (mask.lane_sees(lane, j)) {
            grad_query_[d * kTile + lane] += grad_scores_[(j - group.begin) * lanes + i] * value;
          }
        }
      }
    }
  }

  const BackwardProblem& problem_;
  const AttentionProblem& forward_;
  const Pattern& pattern_;
  const int64_t dim_;
  const int64_t ld_;  // dim_ in whole vectors
  int64_t batch_ = 0;
  int64_t kv_head_ = 0;
  Split split_{0, 0, 0, 0};
  PlaceRanges<kSize> slots_, locals_;
  // (lane, dim), their transposes (dim, lane), and copies without what is not finite
  Acc *query_, *query_lanes_, *finite_query_;
  Acc *grad_, *grad_lanes_, *finite_grad_;
  Acc* out_;                               // (lane, dim): the output, later the queries' gradient
  Acc* grad_query_;                        // (dim, lane)
  Acc *key_, *value_, *finite_key_;        // (key, dim)
  Acc *weights_, *grad_scores_;            // (key, lane of the group)
  Acc *slot_key_sums_, *slot_value_sums_;  // (slot, dim) of this split
  GradientWindow<Acc> window_;
  bool query_is_finite_ = true;
  bool grad_is_finite_ = true;
  bool key_is_finite_ = true;
  Acc lse_[kTile];  // in units of log 2
  Acc delta_[kTile];
};

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

template <typename Fn>
void with_types(ElementType type, const Fn& fn) {
  dispatch_element(type, [&](auto zero) {
    using T = decltype(zero);
    fn(zero, std::conditional_t<std::is_same_v<T, double>, double, float>{});
  });
}

}  // namespace

void attention_backward(const BackwardProblem& problem, int64_t unit_begin, int64_t unit_end,
                        void* scratch) {
  with_types(problem.forward.type, [&](auto element, auto acc) {
    Backward<decltype(element), Multiply<decltype(acc)>> backward(problem, scratch);
    for (int64_t unit = unit_begin; unit < unit_end; ++unit) backward.unit(unit);
  });
}

void attention_backward_slots(const BackwardProblem& problem, int64_t unit_begin,
                              int64_t unit_end) {
  with_types(problem.forward.type, [&](auto element, auto acc) {
    for (int64_t unit = unit_begin; unit < unit_end; ++unit) {
      sum_splits<decltype(element), decltype(acc)>(problem, unit);
    }
  });
}

}  // namespace winnow::CPU_CAPABILITY
