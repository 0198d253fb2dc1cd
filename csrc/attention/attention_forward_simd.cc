// Online softmax over tiles of 64 query rows by up to 80 keys, first the slots, then the local
// rows. Scores have query rows in vector lanes: a tile's queries are transposed once, keys are read
// where they lie, and maximum and sum are kept per lane. Outputs have the head dimension in lanes,
// values too. Reads each key once per tile of queries, writes each output once.
//
// A product over keys that some rows don't see meets zero weights, which an infinite or NaN value
// would turn into NaN. Values are not searched for those: a tile whose result is not finite is
// computed once more with zeros in their place, which is the result of the rows that don't see
// them, to the last bit; then each row that does see one, by itself, from the keys that it sees.
#include "attention/attention_forward_simd.h"

#include <limits>

#include "attention/ahead.h"
#include "attention/arithmetic.h"
#include "attention/key_tile.h"
#include "attention/row_tile.h"
#include "attention/scratch.h"

namespace winnow::CPU_CAPABILITY {
namespace {

template <typename T, class Math>
class Forward {
  using Acc = typename Math::Acc;
  using Vec = typename Math::Vec;
  using Operand = typename Math::Operand;
  using Packed = Pack<T, Math>;
  static constexpr int kSize = Vec::size();
  using Tile = RowTile<kSize>;
  static constexpr Acc kNone = -std::numeric_limits<Acc>::infinity();

 public:
  Forward(const AttentionProblem& problem, void* memory, T* results, Acc* lses)
      : problem_(problem),
        results_(results),
        lses_(lses),
        dim_(problem.dim),
        ld_(padded_dim(problem.dim)),
        depth_((problem.dim + Math::kDepth - 1) / Math::kDepth),
        scale_(static_cast<Acc>(problem.scale * kLog2E)),
        tile_(problem.pattern) {
    Scratch scratch(memory);
    query_ = scratch.take<Operand>(kTile * ld_ + kTile * 16);
    buffer_ = scratch.take<Operand>(kSize * ld_ + kSize * 16);
    single_query_ = scratch.take<Operand>(kSingles * (ld_ + 16));
    out_ = scratch.take<Acc>(kPlaces * ld_);
    key_ = scratch.take<Operand>(kKeyTile * (ld_ + 16));
    value_ = scratch.take<Operand>(kKeyTile * (ld_ + 16));
    scores_ = scratch.take<Acc>(kKeyTile * kTile);
    weights_ = scratch.take<Operand>(kKeyTile * kTile);
    finite_values_ = scratch.take<T>(kKeyTile * dim_);
  }

  void run(const RowTask& task) {
    batch_ = task.batch;
    head_ = task.head;
    out_rows_ = results_ + first_row(task) * dim_;
    lse_ = lses_ + first_row(task);
    for (int64_t row = task.row; row < task.end;) {
      row = tile_.fill(row, task.end);
      attend();
      if (!finish()) again();
    }
  }

  // The task that comes next.
  void expect(const RowTask& task) {
    constexpr auto kBytes = static_cast<int64_t>(sizeof(T));
    const int64_t kv_head = task.head / (problem_.query_heads / problem_.kv_heads);
    ahead_.start(task.end - task.row, dim_ * kBytes);
    ahead_.add<T>(problem_.query, task.batch, task.head, task.row);
    ahead_.add<T>(problem_.key, task.batch, kv_head, task.row);
    ahead_.add<T>(problem_.value, task.batch, kv_head, task.row);
    ahead_.add(results_ + (first_row(task) + task.row) * dim_, dim_ * kBytes);
  }

 private:
  // Of the task's head, among the rows of all heads.
  int64_t first_row(const RowTask& task) const {
    return (task.batch * problem_.query_heads + task.head) * problem_.pattern.rows;
  }

  // The tile once more, as the head of this file says.
  void again() {
    for (bool& sees : sees_nonfinite_) sees = false;
    hide_nonfinite_ = true;
    attend();
    finish();
    hide_nonfinite_ = false;
    int64_t rows[kPlaces];
    int count = 0;
    const auto collect = [&](int begin, int end) {
      for (int place = begin; place < end; ++place) {
        if (sees_nonfinite_[place] && tile_.row[place] >= 0) rows[count++] = tile_.row[place];
      }
    };
    collect(0, tile_.vectors * kSize);
    collect(kTile, kTile + tile_.singles);
    for (int i = 0; i < count; ++i) {
      tile_.fill_single(rows[i]);
      attend();
      finish();
    }
  }

  void attend() {
    const Source& q = problem_.query;
    const T* query = head_rows<T>(q, batch_, head_);
    for (int v = 0; v < tile_.vectors; ++v) {
      int64_t count = 0;
      while (count < kSize && tile_.row[v * kSize + count] >= 0) ++count;
      Packed::lanes(query + tile_.row[v * kSize] * q.row, q.row, count, dim_, buffer_,
                    query_ + v * kSize);
    }
    for (int i = 0; i < tile_.singles; ++i) {
      single_[i] = Packed::rows(query + tile_.row[kTile + i] * q.row, q.row, 1, dim_,
                                single_query_ + i * (ld_ + 16))
                       .data;
    }
    for (int place = 0; place < kPlaces; ++place) {
      top_[place] = kNone;
      sum_[place] = 0;
      decay_[place] = 1;
      fresh_[place] = true;
    }

    attend(tile_.slots, tile_.all(), problem_.slot_key, problem_.slot_value);
    for (int i = 0; i < tile_.segments; ++i) {
      attend(tile_.locals, tile_.segment[i], problem_.key, problem_.value);
    }
  }

  void attend(const PlaceRanges<kSize>& ranges, const Segment& segment, const Source& key,
              const Source& value) {
    const int64_t kv_head = head_ / (problem_.query_heads / problem_.kv_heads);
    const T* keys = head_rows<T>(key, batch_, kv_head);
    const T* values = head_rows<T>(value, batch_, kv_head);
    const KeyRange both[2] = {
        union_of(ranges.some + segment.first_vector, segment.last_vector - segment.first_vector),
        union_of(ranges.place + kTile + segment.first_single,
                 segment.last_single - segment.first_single)};
    const KeyRange range = union_of(both, 2);
    const int64_t size = tile_size(range);
    for (int64_t j = range.begin; j < range.end; j += size) {
      const int64_t count = smaller(size, range.end - j);
      const auto k = Packed::rows(keys + j * key.row, key.row, count, dim_, key_);
      FiniteRows<T> of_tile{values + j * value.row, value.row, false};
      if (hide_nonfinite_) {
        of_tile = without_nonfinite(ranges, j, of_tile.data, of_tile.stride, count);
      }
      const auto v = Packed::columns(of_tile.data, of_tile.stride, count, dim_, value_);
      const TileMask<Math> mask(ranges, segment.first_vector, segment.last_vector, j, count);
      for (int g = 0; g < mask.count; ++g) {
        with_constant<kMaxWidth>(mask.groups[g].width, [&](auto width) {
          weigh<decltype(width)::value>(ranges, mask, mask.groups[g], k, v);
        });
      }
      for (int i = segment.first_single; i < segment.last_single; ++i) {
        const KeyRange sees = mask.inside(ranges.place[kTile + i]);
        weigh_single(i, static_cast<int>(sees.begin), static_cast<int>(sees.end), k, v);
      }
    }
  }

  // Values with zeros for what is not finite; notes who sees such a key.
  FiniteRows<T> without_nonfinite(const PlaceRanges<kSize>& ranges, int64_t first_key,
                                  const T* values, int64_t stride, int64_t count) {
    for (int64_t r = 0; r < count; ++r) {
      if (all_finite(values + r * stride, stride, 1, dim_)) continue;
      for (int place = 0; place < kPlaces; ++place) {
        const KeyRange& sees = ranges.place[place];
        if (sees.begin <= first_key + r && first_key + r < sees.end) sees_nonfinite_[place] = true;
      }
    }
    return finite_rows<Acc>(values, stride, count, dim_, finite_values_);
  }

  // One group of lanes through its keys.
  template <int W>
  void weigh(const PlaceRanges<kSize>& ranges, const TileMask<Math>& mask, const Group& group,
             OperandTile<Operand> k, OperandTile<Operand> v) {
    constexpr int kLanesWide = W * kSize;
    constexpr int kDepth = Math::kDepth;
    const int first_lane = group.vector * kSize;
    product<Math, Into::kScaled, W>(smaller(group.end, mask.keys) - group.begin,
                                    {k.data + group.begin * k.ld, k.ld, 1}, query_ + first_lane,
                                    kTile, depth_, scores_, kLanesWide, &scale_);
    Operand* weights = Math::weights(scores_, weights_);
    softmax<W>(mask, group, weights);
    for (int lane = 0; lane < kLanesWide; lane += kTogether<kSize>) {
      const int place = first_lane + lane;
      const KeyRange sees = mask.inside(ranges.together[place / kTogether<kSize>]);
      const int64_t begin = sees.begin / kDepth;
      const int64_t pairs = (sees.end + kDepth - 1) / kDepth - begin;
      if (pairs <= 0) continue;
      add_values<kTogether<kSize>>(
          place, {weights + (begin - group.begin / kDepth) * kLanesWide + lane, 1, kLanesWide},
          v.data + begin * v.ld, v.ld, pairs);
      ahead_.fetch(kTogether<kSize> / 2);  // half for the slots and half for the local rows
    }
  }

  // out = out * decay + weights * values for the rows of some places. The first time there is no
  // output yet: zeros to begin with would be written to lines that are no longer in the first-level
  // cache, one after another.
  template <int kCount>
  void add_values(int place, Broadcasts<Operand> weights, const Operand* values, int64_t ld,
                  int64_t depth) {
    Acc* out = out_ + place * ld_;
    if (fresh_[place]) {
      const Acc one(1);
      product_columns<Math, Into::kScaled, kCount>(weights, values, ld, depth, ld_, out, ld_, &one);
      fresh_[place] = false;
    } else {
      product_columns<Math, Into::kDecayed, kCount>(weights, values, ld, depth, ld_, out, ld_,
                                                    decay_ + place);
    }
  }

  // A group's scores become weights.
  template <int W>
  void softmax(const TileMask<Math>& mask, const Group& group, Operand* weights) {
    constexpr int kLanesWide = W * kSize;
    const int lane = group.vector * kSize;
    const int keys = group.end - group.begin;
    Vec top[W];
    for (int w = 0; w < W; ++w) top[w] = Vec::loadu(top_ + lane + w * kSize);
    if (group.full_begin <= group.begin && group.end <= group.full_end) {
      for (int j = 0; j < keys; ++j) {
#pragma GCC unroll 4
        for (int w = 0; w < W; ++w) {
          top[w] = larger_lanes(Vec::loadu(scores_ + j * kLanesWide + w * kSize), top[w]);
        }
      }
    } else {
      for (int w = 0; w < W; ++w) {
        const typename TileMask<Math>::Lanes lanes(mask, group.vector + w);
        for (int j = 0; j < keys; ++j) {
          Acc* place = scores_ + j * kLanesWide + w * kSize;
          const Vec s = lanes.where_seen(group.begin + j, Vec::loadu(place), Vec(kNone));
          s.store(place);
          top[w] = larger_lanes(s, top[w]);
        }
      }
    }
    Vec reference[W];
    Vec sum[W];
    for (int w = 0; w < W; ++w) {
      const int place = lane + w * kSize;
      reference[w] = reference_of(top[w]);
      const Vec decay = exp2_lanes(Vec::loadu(top_ + place) - reference[w]);
      sum[w] = Vec::loadu(sum_ + place) * decay;
      decay.store(decay_ + place);
      top[w].store(top_ + place);
    }
    for (int j = 0; j < keys; j += Math::kDepth) {
#pragma GCC unroll 4
      for (int w = 0; w < W; ++w) {
        Vec p[Math::kDepth];
        for (int i = 0; i < Math::kDepth; ++i) {
          p[i] = exp2_lanes(Vec::loadu(scores_ + (j + i) * kLanesWide + w * kSize) - reference[w]);
          sum[w] = sum[w] + p[i];
        }
        Math::store(p, weights + j / Math::kDepth * kLanesWide + w * kSize);
      }
    }
    for (int w = 0; w < W; ++w) sum[w].store(sum_ + lane + w * kSize);
  }

  // Where nothing was seen yet the reference is 0, so that exp2(-inf - 0) = 0 and not NaN.
  static Vec reference_of(const Vec& top) {
    return Vec::blendv(top, Vec(Acc(0)), top == Vec(kNone));
  }

  // One row by itself through the keys [begin, end) of a tile, with keys in lanes for the softmax.
  void weigh_single(int index, int begin, int end, OperandTile<Operand> k, OperandTile<Operand> v) {
    if (begin >= end) return;
    constexpr int kDepth = Math::kDepth;
    const int place = kTile + index;
    const int first = begin / kDepth * kDepth;
    Vec tops(top_[place]);
    for (int j = first; j < end; j += kSize) {
      const int count = end - j < kSize ? end - j : kSize;
      const Vec dots = dot_rows<Math>(single_[index], k.data + j * k.ld, k.ld, count, depth_);
      const Vec key = Vec::arange(static_cast<Acc>(j), Acc(1));
      const Vec seen = (Vec(static_cast<Acc>(begin)) <= key) & (key < Vec(static_cast<Acc>(end)));
      const Vec s = Vec::blendv(Vec(kNone), dots * Vec(scale_), seen);
      s.store(scores_ + j - first);
      tops = larger_lanes(s, tops);
    }
    const Acc top = largest_lane(tops);
    const Acc reference = top == kNone ? Acc(0) : top;
    Vec sums(Acc(0));
    for (int j = first; j < end; j += kSize) {
      const Vec p = exp2_lanes(Vec::loadu(scores_ + j - first) - Vec(reference));
      sums = sums + p;
      Math::store_run(p, weights_ + (j - first) / kDepth);
    }
    decay_[place] = exp2_lane(top_[place] - reference);
    top_[place] = top;
    sum_[place] = sum_[place] * decay_[place] + sum_of_lanes(sums);
    add_values<1>(place, {weights_, 0, 1}, v.data + first / kDepth * v.ld, v.ld,
                  (end - first + kDepth - 1) / kDepth);
    ahead_.fetch(2);
  }

  // Divides by the sums and writes the rows, straight to the result where that has the type of the
  // sums. Returns whether all are finite.
  bool finish() {
    const bool lanes = finish(0, tile_.vectors * kSize);
    return finish(kTile, kTile + tile_.singles) && lanes;
  }

  bool finish(int begin, int end) {
    for (int place = begin; place < end; place += kSize) {
      const Vec sum = Vec::loadu(sum_ + place);
      const Vec lse = (Vec::loadu(top_ + place) + log2_lanes(sum)) * Vec(Acc(kLn2));
      lse.store(lse_of_ + place);
      (Vec(Acc(1)) / sum).store(decay_ + place);
    }
    Vec probe(Acc(0));  // NaN once an infinity or a NaN was multiplied by zero
    for (int place = begin; place < end; ++place) {
      if (tile_.row[place] >= 0) finish_place(place, &probe);
    }
    return probe.zero_mask() == (1 << kSize) - 1;
  }

  void finish_place(int place, Vec* probe) {
    const int64_t row = tile_.row[place];
    Acc* out = out_ + place * ld_;
    T* result = out_rows_ + row * dim_;
    if (sum_[place] == 0) {
      lse_[row] = kNone;
      zero(out, ld_);
      store_row(out, dim_, result);
      return;
    }
    lse_[row] = lse_of_[place];
    Acc* quotients = out;
    if constexpr (std::is_same_v<T, Acc>) {
      if (ld_ == dim_) quotients = result;
    }
    const Vec factor(decay_[place]);
    for (int64_t d = 0; d < ld_; d += kSize) {
      const Vec x = Vec::loadu(out + d) * factor;
      *probe = at::vec::fmadd(x, Vec(Acc(0)), *probe);
      x.store(quotients + d);
    }
    if (quotients == out) store_row(out, dim_, result);
  }

  const AttentionProblem& problem_;
  T* const results_;
  Acc* const lses_;
  const int64_t dim_;
  const int64_t ld_;     // dim_ in whole vectors
  const int64_t depth_;  // dim_ in operands
  const Acc scale_;
  Tile tile_;
  Ahead ahead_;
  int64_t batch_ = 0;
  int64_t head_ = 0;
  T* out_rows_ = nullptr;  // of the head, as the next
  Acc* lse_ = nullptr;
  Operand* query_;         // (dim, lane)
  Operand* buffer_;        // a vector of rows on their way there
  Operand* single_query_;  // (row by itself, dim), where they are not used in place
  Acc* out_;               // (place, dim), not yet divided by the sum
  Operand* key_;           // (key, dim)
  Operand* value_;         // (key, dim)
  Acc* scores_;            // (key, lane of the group)
  Operand* weights_;       // (key, lane of the group), where operands are not the scores' own type
  const Operand* single_[kSingles];
  Acc top_[kPlaces];     // maximum score so far, in units of log 2
  Acc sum_[kPlaces];     // sum of exp2(score - top)
  Acc decay_[kPlaces];   // what the output so far is to be multiplied by
  bool fresh_[kPlaces];  // no output so far; of lanes, the first of each kTogether counts
  Acc lse_of_[kPlaces];
  T* finite_values_;  // (key, dim), see without_nonfinite
  bool hide_nonfinite_ = false;
  bool sees_nonfinite_[kPlaces];
};

}  // namespace

void attention_forward(const AttentionProblem& problem, int64_t unit_begin, int64_t unit_end,
                       void* scratch, void* out, void* lse) {
  with_arithmetic(problem.type, [&](auto zero, auto math) {
    using T = decltype(zero);
    using Acc = typename decltype(math)::Acc;
    Forward<T, decltype(math)> forward(problem, scratch, static_cast<T*>(out),
                                       static_cast<Acc*>(lse));
    for (int64_t unit = unit_begin; unit < unit_end; ++unit) {
      if (unit + 1 < unit_end) forward.expect(row_task(problem, unit + 1));
      forward.run(row_task(problem, unit));
    }
  });
}

}  // namespace winnow::CPU_CAPABILITY
