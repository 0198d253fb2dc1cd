// What each key receives: a tile of keys meets the rows of its key head 64 at a time, four abreast,
// as in paged_attention; their weights exp(score - lse) are summed over the rows in one order.
//
// Memory traffic: the keys once per 64 rows, mostly from the L2 cache; nothing of the size of the
// attention matrix.
#include "kvcache/attention_mass_simd.h"

#include <type_traits>

#include "common/dispatch_simd.h"
#include "common/lanes.h"
#include "kvcache/page_walk.h"
#include "kvcache/tile_lanes.h"
#include "kvcache/tile_math.h"

namespace winnow::CPU_CAPABILITY {
namespace {

constexpr int64_t kAbreast = 4;

int64_t padded_dim(const PagedAttention& call) {
  return round_up(call.head_dim, 2 * kLanes);
}

template <typename T>
struct Rows {
  QueryElement<T>* queries;
  float* lse;
  float* scores;
  float* bias;

  Rows(const PagedAttention& call, void* memory) {
    auto* p = static_cast<float*>(memory);
    queries = reinterpret_cast<QueryElement<T>*>(p);
    lse = p + kAttentionRows * padded_dim(call);
    scores = lse + kAttentionRows;
    bias = scores + kAbreast * kKeys;
  }

  void load(const AttentionMass& call, const PagedAttentionTask& task) const {
    const PagedAttention& attention = call.attention;
    for (int64_t r = 0; r < task.rows; ++r) {
      const int64_t t = (task.first_row + r) / attention.group;
      const int64_t head = task.key_head * attention.group + (task.first_row + r) % attention.group;
      const T* from = static_cast<const T*>(attention.query) +
                      task.batch * attention.query_stride[0] + head * attention.query_stride[1] +
                      t * attention.query_stride[2];
      QueryElement<T>* to = queries + r * padded_dim(attention);
      std::memset(static_cast<void*>(to), 0,
                  static_cast<size_t>(padded_dim(attention)) * sizeof *to);
      load_query<T>(from, attention.head_dim, to);
      lse[r] =
          static_cast<const float*>(call.lse)[task.batch * call.lse_stride[0] +
                                              head * call.lse_stride[1] + t * call.lse_stride[2]];
    }
  }
};

const void* bias_of(const AttentionMass& call, const Tile& tile, int64_t head, int64_t size) {
  return static_cast<const char*>(call.key_bias) +
         (tile.block * call.bias_stride[0] + head * call.bias_stride[1] +
          tile.slot * call.bias_stride[2]) *
             size;
}

// Adds the weights of one row to what the keys of a tile have received from others.
void add_weights(const float* scores, const Tile& tile, const Span& span, float scale,
                 const float* bias, float lse, float* received) {
  const bool whole = span.covers(tile.position, tile.keys);
  const auto local = [&](int64_t bound) {
    return static_cast<int32_t>(larger(-1, smaller(bound - tile.position, kKeys)));
  };
  const i32x16 low = local(span.low);
  const i32x16 high = local(span.high);
  const i32x16 sinks = local(span.sinks);
  for (int64_t j = 0; j < tile.keys; j += kLanes) {
    f32x16 x = load_lanes(scores + j) * scale;
    if (bias) {
      const f32x16 extra = load_lanes(bias + j);
      x = select(extra == f32x16(kNone), f32x16(kNone), x + extra);  // hides even a NaN
    }
    i32x16 hidden = x == f32x16(kNone);
    if (!whole || j + kLanes > tile.keys) {
      const i32x16 index = lane_index() + static_cast<int32_t>(j);
      const i32x16 seen = ((index > low - 1) & (index < high)) | (index < sinks);
      hidden = select(seen & (index < static_cast<int32_t>(tile.keys)), hidden, i32x16(-1));
    }
    const f32x16 weight = select(hidden, f32x16(0.0f), exp_lanes(x - lse));
    store_lanes(received + j, load_lanes(received + j) + weight);
  }
}

template <int NR, typename T>
void add_rows(const AttentionMass& call, const PagedAttentionTask& task, const Tile& tile,
              int64_t first, const Rows<T>& rows, float* received, Ahead ahead) {
  const PagedAttention& attention = call.attention;
  dot_rows<NR, T>(rows.queries + first * padded_dim(attention), padded_dim(attention),
                  key_row<T>(attention, tile, task.key_head), attention.key_stride[2], tile.keys,
                  attention.head_dim, rows.scores, ahead);
  const int64_t length = attention.seq_lens[task.batch];
  for (int r = 0; r < NR; ++r) {
    add_weights(rows.scores + r * kKeys, tile,
                span_of(attention, length, task.first_row + first + r),
                static_cast<float>(attention.scale), call.key_bias ? rows.bias : nullptr,
                rows.lse[first + r], received);
  }
}

template <typename T>
void run_task(const AttentionMass& call, const PagedAttentionTask& task, const Rows<T>& rows,
              float* mass) {
  const PagedAttention& attention = call.attention;
  rows.load(call, task);
  Walk walk(attention, task);
  Tile tile;
  Tile next{};
  bool more = walk.next(&tile);
  while (more) {
    more = walk.next(&next);
    if (!more) next.keys = 0;
    if (call.key_bias) {
      const auto* from = static_cast<const float*>(bias_of(call, tile, task.key_head, 4));
      for (int64_t j = 0; j < tile.keys; ++j) rows.bias[j] = from[j * call.bias_stride[2]];
    }
    alignas(64) float received[kKeys] = {};
    // The next tile comes while the first rows meet this one.
    Ahead ahead = ahead_of(key_row<T>(attention, next, task.key_head), attention.head_dim,
                           attention.key_stride[2], next.keys);
    for (int64_t r = 0; r < task.rows; ahead = {}) {
      if (r + kAbreast <= task.rows) {
        add_rows<kAbreast, T>(call, task, tile, r, rows, received, ahead);
        r += kAbreast;
      } else {
        add_rows<1, T>(call, task, tile, r, rows, received, ahead);
        ++r;
      }
    }
    for (int64_t j = 0; j < tile.keys; ++j) mass[tile.position + j] += received[j];
    tile = next;
  }
}

void run_double(const AttentionMass& call, const PagedAttentionTask& task, double* mass) {
  const PagedAttention& attention = call.attention;
  const double none = -std::numeric_limits<double>::infinity();
  for (int64_t r = 0; r < task.rows; ++r) {
    const int64_t row = task.first_row + r;
    const int64_t head = task.key_head * attention.group + row % attention.group;
    const int64_t t = row / attention.group;
    const double* q = static_cast<const double*>(attention.query) +
                      task.batch * attention.query_stride[0] + head * attention.query_stride[1] +
                      t * attention.query_stride[2];
    const double lse =
        static_cast<const double*>(call.lse)[task.batch * call.lse_stride[0] +
                                             head * call.lse_stride[1] + t * call.lse_stride[2]];
    const Span span = span_of(attention, attention.seq_lens[task.batch], row);
    Walk walk(attention, task);
    Tile tile;
    while (walk.next(&tile)) {
      const auto* bias = call.key_bias
                             ? static_cast<const double*>(bias_of(call, tile, task.key_head, 8))
                             : nullptr;
      for (int64_t j = 0; j < tile.keys; ++j) {
        if (!span.has(tile.position + j)) continue;
        const double extra = bias ? bias[j * call.bias_stride[2]] : 0.0;
        const double* k =
            key_row<double>(attention, tile, task.key_head) + j * attention.key_stride[2];
        double score = 0.0;
        for (int64_t d = 0; d < attention.head_dim; ++d) score += q[d] * k[d];
        score = score * attention.scale + extra;
        if (extra == none || score == none) continue;
        mass[tile.position + j] += __builtin_exp(score - lse);
      }
    }
  }
}

}  // namespace

void attention_mass_scratch(const AttentionMass& call, int64_t* floats) {
  *floats = kAttentionRows * (padded_dim(call.attention) + 1) + (kAbreast + 1) * kKeys;
}

void attention_mass_task(const AttentionMass& call, int64_t batch, int64_t key_head, int64_t begin,
                         int64_t end, void* scratch) {
  const PagedAttention& attention = call.attention;
  const int64_t row_count = attention.queries * attention.group;
  dispatch_element(attention.type, [&](auto zero) {
    using T = decltype(zero);
    using Result = std::conditional_t<std::is_same_v<T, double>, double, float>;
    Result* mass = static_cast<Result*>(call.mass) +
                   (batch * attention.key_heads + key_head) * call.entries * attention.block_size;
    std::memset(mass + begin * attention.block_size, 0,
                static_cast<size_t>((end - begin) * attention.block_size) * sizeof *mass);
    for (int64_t first = 0; first < row_count; first += kAttentionRows) {
      const PagedAttentionTask task{
          batch, key_head, first, smaller(kAttentionRows, row_count - first), begin, end, -1};
      if constexpr (std::is_same_v<T, double>) {
        run_double(call, task, mass);
      } else {
        run_task<T>(call, task, Rows<T>(attention, scratch), mass);
      }
    }
  });
}

}  // namespace winnow::CPU_CAPABILITY
