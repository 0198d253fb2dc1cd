// Gradients in one pass over tiles of 64 query rows by up to 80 keys: weights are recomputed from
// the saved lse, then
//   dV += P^T dO,  dS = P * (dO V^T - delta) * scale,  dK += dS^T Q,  dQ += dS K
// with delta = rowsum(dO * O) - dlse. Local key gradients live in a window that follows the rows,
// slot gradients in one buffer per split. No atomics; see BackwardProblem for the order of sums.
#include "attention/attention_backward_simd.h"

#include <limits>

#include "attention/ahead.h"
#include "attention/arithmetic.h"
#include "attention/gradient_splits.h"
#include "attention/gradient_window.h"
#include "attention/key_tile.h"
#include "attention/scratch.h"

namespace winnow::CPU_CAPABILITY {
namespace {

template <typename T, class Math>
class Backward {
  using Acc = typename Math::Acc;
  using Vec = typename Math::Vec;
  using Operand = typename Math::Operand;
  using Packed = Pack<T, Math>;
  static constexpr int kSize = Vec::size();
  static constexpr int kDepth = Math::kDepth;

 public:
  Backward(const BackwardProblem& problem, void* memory)
      : problem_(problem),
        forward_(problem.forward),
        pattern_(problem.forward.pattern),
        dim_(problem.forward.dim),
        ld_(padded_dim(problem.forward.dim)),
        depth_((problem.forward.dim + kDepth - 1) / kDepth) {
    Scratch scratch(memory);
    for (Operand** tile : {&query_lanes_, &grad_lanes_, &query_, &grad_}) {
      *tile = scratch.take<Operand>(kTile * (ld_ + 16));
    }
    for (Operand** tile : {&key_, &value_, &key_columns_}) {
      *tile = scratch.take<Operand>(kKeyTile * (ld_ + 16));
    }
    buffer_ = scratch.take<Operand>(kSize * (ld_ + 16));
    grad_query_ = scratch.take<Acc>(kTile * ld_);
    for (Acc** scores : {&weights_, &grad_scores_}) *scores = scratch.take<Acc>(kKeyTile * kTile);
    for (Operand** scores : {&weight_runs_, &grad_runs_, &grad_pairs_}) {
      *scores = scratch.take<Operand>(kKeyTile * kTile);
    }
    for (T** copy : {&finite_query_, &finite_grad_, &finite_key_}) {
      *copy = scratch.take<T>(kKeyTile * dim_);
    }
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
    return head_rows<T>(source, batch_, head);
  }

  void tile(int64_t head, int64_t row, int64_t count, bool own) {
    load_queries(head, row, count);
    see_rows(row, count);
    zero(grad_query_, count * ld_);
    if (own) expect(head, row + count);
    if (own) {
      attend(slots_, forward_.slot_key, forward_.slot_value, slot_key_sums_, slot_value_sums_,
             true);
      // Keys of earlier splits: their own split accumulates them.
      attend(locals_.within(0, split_.row_begin), forward_.key, forward_.value, nullptr, nullptr,
             true);
    }
    attend(locals_.within(split_.row_begin, split_.row_end), forward_.key, forward_.value,
           window_.key(0), window_.value(0), own);
    if (!own) return;
    const int64_t first = (batch_ * forward_.query_heads + head) * pattern_.rows + row;
    for (int64_t lane = 0; lane < count; ++lane) {
      store_row(grad_query_ + lane * ld_, dim_,
                static_cast<T*>(problem_.grad_query) + (first + lane) * dim_);
    }
  }

  // The rows that come next, if any.
  void expect(int64_t head, int64_t row) {
    constexpr auto kBytes = static_cast<int64_t>(sizeof(T));
    const int64_t count = smaller(kTile, split_.row_end - row);
    const int64_t first = (batch_ * forward_.query_heads + head) * pattern_.rows + row;
    ahead_.start(count, dim_ * kBytes);
    ahead_.add<T>(forward_.query, batch_, head, row);
    ahead_.add<T>(problem_.grad_out, batch_, head, row);
    ahead_.add<T>(forward_.key, batch_, kv_head_, row);
    ahead_.add<T>(forward_.value, batch_, kv_head_, row);
    ahead_.add(static_cast<const T*>(problem_.out) + first * dim_, dim_ * kBytes);
    ahead_.add(static_cast<const T*>(problem_.grad_query) + first * dim_, dim_ * kBytes);
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
    for (int v = 0; v < kTile / kSize; ++v) slots_.bound(v);
  }

  void load_queries(int64_t head, int64_t row, int64_t count) {
    const Source& q = forward_.query;
    const Source& g = problem_.grad_out;
    const int64_t first = (batch_ * forward_.query_heads + head) * pattern_.rows + row;
    count_ = count;
    query_rows_ = {rows_of(q, head) + row * q.row, q.row, false};
    grad_rows_ = {rows_of(g, head) + row * g.row, g.row, false};
    const auto finite_query = finite_rows<Acc>(query_rows_.data, q.row, count, dim_, finite_query_);
    const auto finite_grad = finite_rows<Acc>(grad_rows_.data, g.row, count, dim_, finite_grad_);
    query_rows_.copied = finite_query.copied;
    grad_rows_.copied = finite_grad.copied;
    query_columns_ = Packed::columns(finite_query.data, finite_query.stride, count, dim_, query_);
    grad_columns_ = Packed::columns(finite_grad.data, finite_grad.stride, count, dim_, grad_);
    for (int64_t lane = 0; lane < kTile; lane += kSize) {
      const int64_t rows = larger(0, smaller(kSize, count - lane));
      Packed::lanes(query_rows_.data + lane * q.row, q.row, rows, dim_, buffer_,
                    query_lanes_ + lane);
      Packed::lanes(grad_rows_.data + lane * g.row, g.row, rows, dim_, buffer_, grad_lanes_ + lane);
    }

    const T* out = static_cast<const T*>(problem_.out) + first * dim_;
    const Acc* lse = static_cast<const Acc*>(problem_.lse) + first;
    const Acc* grad_lse = static_cast<const Acc*>(problem_.grad_lse) + first;
    for (int lane = 0; lane < kTile; ++lane) {
      lse_[lane] = 0;
      delta_[lane] = 0;
      if (lane >= count) continue;
      // A row that attends nothing has weights exp2(score - inf) = 0.
      constexpr Acc kInfinity = std::numeric_limits<Acc>::infinity();
      lse_[lane] = lse[lane] == -kInfinity ? kInfinity : lse[lane] * Acc(kLog2E);
      Acc a[padded_dim(256)];
      Acc b[padded_dim(256)];
      load_rows(grad_rows_.data + lane * g.row, 0, 1, dim_, a, ld_);
      load_rows(out + lane * dim_, 0, 1, dim_, b, ld_);
      Vec sum(Acc(0));
      for (int64_t d = 0; d < ld_; d += kSize) {
        sum = at::vec::fmadd(Vec::loadu(a + d), Vec::loadu(b + d), sum);
      }
      delta_[lane] = sum_of_lanes(sum) - grad_lse[lane];
    }
  }

  // One tile of keys as operands.
  struct Keys {
    OperandTile<Operand> keys, values;  // (key, dim), for products over dim
    OperandTile<Operand> columns;       // keys for products over keys, without what is not finite
    FiniteRows<T> rows;                 // keys as they are; copied where some number is not finite
  };

  // key_sums, value_sums: where the gradient of key 0 would lie, or null.
  void attend(const PlaceRanges<kSize>& ranges, const Source& key, const Source& value,
              Acc* key_sums, Acc* value_sums, bool queries) {
    const KeyRange range = union_of(ranges.some, kTile / kSize);
    const int64_t size = tile_size(range);
    for (int64_t j = range.begin; j < range.end; j += size) {
      const int64_t count = smaller(size, range.end - j);
      const T* keys = rows_of(key, kv_head_) + j * key.row;
      const T* values = rows_of(value, kv_head_) + j * value.row;
      Keys tile{Packed::rows(keys, key.row, count, dim_, key_),
                Packed::rows(values, value.row, count, dim_, value_),
                {nullptr, 0},
                {keys, key.row, false}};
      if (queries) {
        const auto finite = finite_rows<Acc>(keys, key.row, count, dim_, finite_key_);
        tile.rows.copied = finite.copied;
        tile.columns = Packed::columns(finite.data, finite.stride, count, dim_, key_columns_);
      }
      const TileMask<Math> mask(ranges, 0, kTile / kSize, j, count);
      for (int g = 0; g < mask.count; ++g) {
        with_constant<kMaxWidth>(mask.groups[g].width, [&](auto width) {
          group<decltype(width)::value>(ranges, mask, mask.groups[g], tile,
                                        key_sums ? key_sums + j * ld_ : nullptr,
                                        value_sums ? value_sums + j * ld_ : nullptr, queries);
        });
      }
    }
  }

  template <int W>
  void group(const PlaceRanges<kSize>& ranges, const TileMask<Math>& mask, const Group& group,
             const Keys& tile, Acc* key_sums, Acc* value_sums, bool queries) {
    constexpr int kLanesWide = W * kSize;
    const int lane = group.vector * kSize;
    const int64_t keys = smaller(group.end, mask.keys) - group.begin;
    const Acc scale = static_cast<Acc>(forward_.scale * kLog2E);
    const Acc one(1);
    product<Math, Into::kScaled, W>(keys, from(tile.keys, group.begin), query_lanes_ + lane, kTile,
                                    depth_, weights_, kLanesWide, &scale);
    product<Math, Into::kScaled, W>(keys, from(tile.values, group.begin), grad_lanes_ + lane, kTile,
                                    depth_, grad_scores_, kLanesWide, &one);
    weigh<W>(mask, group);
    if (value_sums) {
      add_rows(mask, group, kLanesWide, weights_, Math::weights(weights_, weight_runs_),
               grad_columns_, grad_rows_, value_sums);
      add_rows(mask, group, kLanesWide, grad_scores_, Math::weights(grad_scores_, grad_runs_),
               query_columns_, query_rows_, key_sums);
    }
    ahead_.fetch(kLanesWide / 2);
    if (!queries) return;
    const Operand* pairs = Math::weights(grad_scores_, grad_pairs_);
    for (int place = lane; place < lane + kLanesWide; place += kTogether<kSize>) {
      const KeyRange sees = mask.inside(ranges.together[place / kTogether<kSize>]);
      const int64_t begin = sees.begin / kDepth;
      const int64_t depth = (sees.end + kDepth - 1) / kDepth - begin;
      if (sees.begin >= sees.end) continue;
      product_columns<Math, Into::kAdded, kTogether<kSize>>(
          {pairs + (begin - group.begin / kDepth) * kLanesWide + place - lane, 1, kLanesWide},
          tile.columns.data + begin * tile.columns.ld, tile.columns.ld, depth, ld_,
          grad_query_ + place * ld_, ld_, nullptr);
    }
    if (tile.rows.copied) add_nonfinite_keys(mask, group, kLanesWide, tile.rows);
  }

  static Broadcasts<Operand> from(const OperandTile<Operand>& tile, int64_t row) {
    return {tile.data + row * tile.ld, tile.ld, 1};
  }

  // sums[key] += sum over a group's lanes of weight[key][lane] * x[lane].
  void add_rows(const TileMask<Math>& mask, const Group& group, int lanes, const Acc* weights,
                const Operand* runs, const OperandTile<Operand>& columns, const FiniteRows<T>& x,
                Acc* sums) const {
    const int64_t keys = smaller(group.end, mask.keys) - group.begin;
    const int64_t lane = group.vector * kSize;
    const int64_t depth = (smaller(lanes, count_ - lane) + kDepth - 1) / kDepth;
    product_columns<Math, Into::kAdded>({runs, lanes / kDepth, 1},
                                        columns.data + lane / kDepth * columns.ld, columns.ld,
                                        depth, ld_, sums + group.begin * ld_, ld_, nullptr, keys);
    if (x.copied) add_nonfinite_rows(mask, group, lanes, weights, x, sums);
  }

  // Scores and dO V^T of a group become weights and score gradients.
  template <int W>
  void weigh(const TileMask<Math>& mask, const Group& group) {
    constexpr int kLanesWide = W * kSize;
    const Vec scale(static_cast<Acc>(forward_.scale));
    const Vec none(Acc(0));
    const int keys = group.end - group.begin;
    const bool full = group.full_begin <= group.begin && group.end <= group.full_end;
    for (int w = 0; w < W; ++w) {
      const int place = (group.vector + w) * kSize;
      const Vec lse = Vec::loadu(lse_ + place);
      const Vec delta = Vec::loadu(delta_ + place);
      const typename TileMask<Math>::Lanes lanes(mask, group.vector + w);
      for (int j = 0; j < keys; j += kDepth) {
        Vec grads[kDepth];
        for (int i = 0; i < kDepth; ++i) {
          const int64_t x = (j + i) * kLanesWide + w * kSize;
          Vec p = exp2_lanes(Vec::loadu(weights_ + x) - lse);
          grads[i] = p * (Vec::loadu(grad_scores_ + x) - delta) * scale;
          if (!full) {
            p = lanes.where_seen(group.begin + j + i, p, none);
            grads[i] = lanes.where_seen(group.begin + j + i, grads[i], none);
          }
          p.store(weights_ + x);
          grads[i].store(grad_scores_ + x);
          if constexpr (kDepth > 1) {
            Math::store_run(p, weight_runs_ + x / kDepth);
            Math::store_run(grads[i], grad_runs_ + x / kDepth);
          }
        }
        if constexpr (kDepth > 1) {
          Math::store(grads, grad_pairs_ + j / kDepth * kLanesWide + w * kSize);
        }
      }
    }
  }

  // What finite_rows left out of the sums.
  void add_nonfinite_rows(const TileMask<Math>& mask, const Group& group, int lanes,
                          const Acc* weight, const FiniteRows<T>& rows, Acc* sums) const {
    const int64_t last = smaller(lanes, count_ - group.vector * kSize);
    for (int i = 0; i < last; ++i) {
      const int lane = group.vector * kSize + i;
      for_nonfinite<Acc>(rows, lane, dim_, [&](int64_t d, Acc value) {
        for (int j = group.begin; j < group.end; ++j) {
          if (mask.lane_sees(lane, j)) {
            sums[j * ld_ + d] += weight[(j - group.begin) * lanes + i] * value;
          }
        }
      });
    }
  }

  void add_nonfinite_keys(const TileMask<Math>& mask, const Group& group, int lanes,
                          const FiniteRows<T>& rows) {
    const int last = static_cast<int>(smaller(group.end, mask.keys));
    for (int j = group.begin; j < last; ++j) {
      for_nonfinite<Acc>(rows, j, dim_, [&](int64_t d, Acc value) {
        for (int i = 0; i < lanes; ++i) {
          const int lane = group.vector * kSize + i;
          if (mask.lane_sees(lane, j)) {
            grad_query_[lane * ld_ + d] += grad_scores_[(j - group.begin) * lanes + i] * value;
          }
        }
      });
    }
  }

  const BackwardProblem& problem_;
  const AttentionProblem& forward_;
  const Pattern& pattern_;
  const int64_t dim_;
  const int64_t ld_;     // dim_ in whole vectors
  const int64_t depth_;  // dim_ in operands
  int64_t batch_ = 0;
  int64_t kv_head_ = 0;
  Split split_{0, 0, 0, 0};
  PlaceRanges<kSize> slots_, locals_;
  int64_t count_ = 0;                                  // rows of the tile
  FiniteRows<T> query_rows_, grad_rows_;               // as they are
  OperandTile<Operand> query_columns_, grad_columns_;  // (lane, dim), for products over lanes
  Operand *query_lanes_, *grad_lanes_;                 // (dim, lane)
  Operand *query_, *grad_, *key_, *value_, *key_columns_, *buffer_;  // what is not used in place
  T *finite_query_, *finite_grad_, *finite_key_;
  Acc* grad_query_;                        // (lane, dim)
  Acc *weights_, *grad_scores_;            // (key, lane of the group)
  Operand *weight_runs_, *grad_runs_;      // the same as operands along lanes,
  Operand* grad_pairs_;                    // and along keys, where operands are not numbers
  Acc *slot_key_sums_, *slot_value_sums_;  // (slot, dim) of this split
  GradientWindow<Acc> window_;
  Ahead ahead_;
  Acc lse_[kTile];  // in units of log 2
  Acc delta_[kTile];
};

}  // namespace

void attention_backward(const BackwardProblem& problem, int64_t unit_begin, int64_t unit_end,
                        void* scratch) {
  with_arithmetic(problem.forward.type, [&](auto element, auto math) {
    Backward<decltype(element), decltype(math)> backward(problem, scratch);
    for (int64_t unit = unit_begin; unit < unit_end; ++unit) backward.unit(unit);
  });
}

}  // namespace winnow::CPU_CAPABILITY
