// Online softmax over tiles of 64 query rows by up to 64 keys, first the slots, then the local
// rows. Queries lie in vector lanes: a tile's queries are transposed once, keys and values are
// packed as they are, running maximum, sum and output are kept per lane. Reads each key once per
// tile of queries, writes each output once.
#include "attention/attention_forward_simd.h"

#include <limits>

#include "attention/dot_bf16.h"
#include "attention/key_tile.h"
#include "attention/operands.h"
#include "attention/scratch.h"
#include "common/dispatch_simd.h"

namespace winnow::CPU_CAPABILITY {
namespace {

constexpr double kLog2E = 1.4426950408889634;
constexpr double kLn2 = 0.6931471805599453;

template <typename T, class Math>
class Forward {
  using Acc = typename Math::Acc;
  using Vec = typename Math::Vec;
  using Operand = typename Math::Operand;
  using Packed = Pack<T, Math>;
  static constexpr int kSize = Vec::size();
  static constexpr Acc kNone = -std::numeric_limits<Acc>::infinity();

 public:
  Forward(const AttentionProblem& problem, void* memory)
      : problem_(problem), dim_(problem.dim), ld_(padded_dim(problem.dim)) {
    Scratch scratch(memory);
    rows_ = scratch.take<Acc>(kTile * ld_);
    query_ = scratch.take<Operand>(kTile * ld_ + kTile * 16);
    out_ = scratch.take<Acc>(kTile * ld_);
    key_ = scratch.take<Operand>(kTile * ld_ + kTile * 16);
    value_ = scratch.take<Operand>(kTile * ld_ + kTile * 16);
    scores_ = scratch.take<Acc>(kTile * kTile);
    weights_ = scratch.take<Operand>(kTile * kTile);
  }

  void tile(int64_t batch, int64_t head, int64_t row, T* out, Acc* lse) {
    const int64_t count = smaller(kTile, problem_.pattern.rows - row);
    const int64_t kv_head = head / (problem_.query_heads / problem_.kv_heads);
    const Source& q = problem_.query;
    Packed::lanes(static_cast<const T*>(q.data) + batch * q.batch + head * q.head + row * q.row,
                  q.row, count, dim_, key_, query_);
    zero(out_, ld_ * kTile);
    for (int lane = 0; lane < kTile; ++lane) {
      top_[lane] = kNone;
      sum_[lane] = 0;
    }

    visible_ranges(problem_.pattern, row, count, &slots_, &locals_);
    attend(slots_, problem_.slot_key, problem_.slot_value, batch, kv_head);
    attend(locals_, problem_.key, problem_.value, batch, kv_head);
    finish(count, out, lse);
  }

 private:
  void attend(const LaneRanges& ranges, const Source& key, const Source& value, int64_t batch,
              int64_t kv_head) {
    int64_t first;
    int64_t last;
    ranges.bounds(&first, &last);
    const T* keys = static_cast<const T*>(key.data) + batch * key.batch + kv_head * key.head;
    const T* values =
        static_cast<const T*>(value.data) + batch * value.batch + kv_head * value.head;
    for (int64_t j = first; j < last; j += kTile) {
      const int64_t count = smaller(kTile, last - j);
      const TileMask<Math> mask(ranges, j, count);
      bool finite;
      const auto k = Packed::rows(keys + j * key.row, key.row, count, dim_, key_);
      const auto v =
          Packed::columns(values + j * value.row, value.row, count, dim_, value_, &finite);
      for (int g = 0; g < mask.count; ++g) {
        const Group& group = mask.groups[g];
        with_width(group.width, [&](auto width) {
          const Operand* weights = weigh<decltype(width)::value>(mask, group, k, v);
          if (!finite) {
            add_nonfinite(mask, group, values + j * value.row, value.row, weights,
                          group.width * kSize);
          }
        });
      }
    }
  }

  // One group of lanes through its keys; returns the weights.
  template <int W>
  const Operand* weigh(const TileMask<Math>& mask, const Group& group, OperandTile<Operand> k,
                       OperandTile<Operand> v) {
    constexpr int kLanesWide = W * kSize;
    const int first_lane = group.vector * kSize;
    const int keys = group.end - group.begin;
    Vec factor[W];
    for (Vec& vec : factor) vec = Vec(static_cast<Acc>(problem_.scale * kLog2E));
    product<Math, W, false>(keys, {k.data + group.begin * k.ld, k.ld, 1}, query_ + first_lane,
                            kTile, (dim_ + Math::kDepth - 1) / Math::kDepth, scores_, kLanesWide,
                            factor);
    Operand* weights = Packed::weights(scores_, weights_);
    for (int w = 0; w < W; ++w) {
      factor[w] = softmax(mask, group, group.vector + w, scores_ + w * kSize, kLanesWide,
                          weights + w * kSize);
    }
    product<Math, W, true>(dim_, {v.data + group.begin / Math::kDepth * v.ld, 1, v.ld}, weights,
                           kLanesWide, keys / Math::kDepth, out_ + first_lane, kTile, factor);
    return weights;
  }

  // Scores of one vector of lanes become weights; returns the factor that the lanes' output so far
  // is to be multiplied by.
  Vec softmax(const TileMask<Math>& mask, const Group& group, int v, Acc* scores, int64_t ld,
              Operand* weights) {
    const Vec before = Vec::loadu(top_ + v * kSize);
    const int keys = group.end - group.begin;
    Vec top = before;
    for (int j = 0; j < keys; ++j) {
      Vec s = Vec::loadu(scores + j * ld);
      if (group.begin + j < group.full_begin || group.begin + j >= group.full_end) {
        s = Vec::blendv(Vec(kNone), s, mask.sees(v, group.begin + j));
        s.store(scores + j * ld);
      }
      top = larger_lanes(s, top);
    }
    // Where nothing was seen yet the reference is 0, so that exp2(-inf - 0) = 0 and not NaN.
    const Vec reference = Vec::blendv(top, Vec(Acc(0)), top == Vec(kNone));
    const Vec decay = exp2_lanes(before - reference);
    Vec sum(Acc(0));
    for (int j = 0; j < keys; j += Math::kDepth) {
      Vec p[Math::kDepth];
      for (int i = 0; i < Math::kDepth; ++i) {
        p[i] = exp2_lanes(Vec::loadu(scores + (j + i) * ld) - reference);
        sum = sum + p[i];
      }
      Math::store(p, weights + j / Math::kDepth * ld);
    }
    top.store(top_ + v * kSize);
    at::vec::fmadd(Vec::loadu(sum_ + v * kSize), decay, sum).store(sum_ + v * kSize);
    return decay;
  }

  // What Pack::columns left out, for the lanes that do see it. The result there is infinite or NaN
  // whatever the order of the terms.
  void add_nonfinite(const TileMask<Math>& mask, const Group& group, const T* values,
                     int64_t stride, const Operand* weights, int lanes) {
    const int keys = static_cast<int>(smaller(group.end, mask.keys));
    for (int j = group.begin; j < keys; ++j) {
      load_rows(values + j * stride, 0, 1, dim_, rows_, ld_);
      for (int64_t d = 0; d < dim_; ++d) {
        if (rows_[d] * Acc(0) == Acc(0)) continue;
        for (int i = 0; i < lanes; ++i) {
          const int lane = group.vector * kSize + i;
          if (mask.lane_sees(lane, j)) {
            out_[d * kTile + lane] += Packed::weight(weights, lanes, j - group.begin, i) * rows_[d];
          }
        }
      }
    }
  }

  // Divides by the sums and writes the rows.
  void finish(int64_t count, T* out, Acc* lse) {
    for (int64_t lane = 0; lane < kTile; ++lane) {
      if (lane < count) {
        lse[lane] = sum_[lane] == 0
                        ? kNone
                        : static_cast<Acc>((top_[lane] + std::log2(sum_[lane])) * Acc(kLn2));
      }
      sum_[lane] = sum_[lane] == 0 ? Acc(0) : 1 / sum_[lane];
    }
    for (int64_t d = 0; d < dim_; ++d) {
      for (int x = 0; x < kTile; x += kSize) {
        Acc* place = out_ + d * kTile + x;
        (Vec::loadu(place) * Vec::loadu(sum_ + x)).store(place);
      }
    }
    if constexpr (std::is_same_v<T, Acc>) {
      if (count == kTile && ld_ == dim_) {
        transpose_tile(out_, kTile, ld_, kTile, out, dim_);
        return;
      }
    }
    transpose_tile(out_, kTile, ld_, kTile, rows_, ld_);
    for (int64_t lane = 0; lane < count; ++lane) {
      store_row(rows_ + lane * ld_, dim_, out + lane * dim_);
    }
  }

  const AttentionProblem& problem_;
  const int64_t dim_;
  const int64_t ld_;  // dim_ in whole vectors
  LaneRanges slots_, locals_;
  Acc* rows_;         // (lane, dim): outputs on their way out
  Operand* query_;    // (dim, lane)
  Acc* out_;          // (dim, lane), not yet divided by the sum
  Operand* key_;      // (key, dim)
  Operand* value_;    // (key, dim)
  Acc* scores_;       // (key, lane of the group)
  Operand* weights_;  // (key, lane of the group), where operands are not the scores' own type
  Acc top_[kTile];    // maximum score so far, in units of log 2
  Acc sum_[kTile];    // sum of exp2(score - top)
};

template <typename T, class Math>
void forward_units_of(const AttentionProblem& problem, int64_t unit_begin, int64_t unit_end,
                      void* scratch, void* out, void* lse) {
  Forward<T, Math> forward(problem, scratch);
  const int64_t tiles = row_tiles(problem.pattern.rows);
  for (int64_t unit = unit_begin; unit < unit_end; ++unit) {
    const int64_t head = unit / tiles;
    // Early and late tiles alternate: later ones see more, and threads get neighbouring units.
    const int64_t place = unit % tiles;
    const int64_t row = (place % 2 == 0 ? place / 2 : tiles - 1 - place / 2) * kTile;
    const int64_t first = head * problem.pattern.rows + row;
    forward.tile(head / problem.query_heads, head % problem.query_heads, row,
                 static_cast<T*>(out) + first * problem.dim,
                 static_cast<typename Math::Acc*>(lse) + first);
  }
}

}  // namespace

void attention_forward(const AttentionProblem& problem, int64_t unit_begin, int64_t unit_end,
                       void* scratch, void* out, void* lse) {
  dispatch_element(problem.type, [&](auto zero) {
    using T = decltype(zero);
    using Acc = std::conditional_t<std::is_same_v<T, double>, double, float>;
#ifdef __AVX512BF16__
    using Math = std::conditional_t<std::is_same_v<T, c10::BFloat16>, DotBf16, Multiply<Acc>>;
#else
    using Math = Multiply<Acc>;
#endif
    forward_units_of<T, Math>(problem, unit_begin, unit_end, scratch, out, lse);
  });
}

}  // namespace winnow::CPU_CAPABILITY
