// Attention over pages, with the online softmax of Milakov and Gimelshein (2018). A tile of up to
// 64 keys is read once for all rows of a task, that is for all query heads of its key head: scores
// of four rows at a time, their weights, and the weighted values. Sums stay in scratch memory. The
// rows of the next tile are prefetched while this one is computed, because pages lie scattered and
// the machine's own prefetcher stops at each end. Tasks that share blocks take turns on each tile.
//
// Memory traffic: keys and values once, in 64-row tasks, and once for the tasks of a cascade;
// scores never leave the L1 cache.
#include "kvcache/paged_attention_simd.h"

#include <limits>
#include <type_traits>

#include "common/dispatch_simd.h"
#include "common/lanes.h"
#include "kvcache/code_numbers.h"
#include "kvcache/page_walk.h"
#include "kvcache/paged_attention_double.h"
#include "kvcache/tile_codes.h"
#include "kvcache/tile_lanes.h"
#include "kvcache/tile_math.h"

namespace winnow::CPU_CAPABILITY {
namespace {

int64_t padded_dim(const PagedAttention& call) {
  return round_up(call.head_dim, kCodes);
}

int64_t padded_values(const PagedAttention& call) {
  return round_up(call.value_dim, kStep);
}

template <typename T>
void load_queries(const PagedAttention& call, const PagedAttentionTask& task,
                  RowElement<T>* queries, [[maybe_unused]] WordRow* words) {
  const int64_t stride = padded_dim(call);
  for (int64_t r = 0; r < task.rows; ++r) {
    const int64_t row = task.first_row + r;
    const int64_t offset = task.batch * call.query_stride[0] +
                           (task.key_head * call.group + row % call.group) * call.query_stride[1] +
                           row / call.group * call.query_stride[2];
    RowElement<T>* to = queries + r * stride;
    std::memset(static_cast<void*>(to), 0, static_cast<size_t>(stride) * sizeof *to);
    if constexpr (ElementsOf<T>::kCodePairs) {
      const auto* from = static_cast<const c10::BFloat16*>(call.query) + offset;
      constexpr int64_t kRun = 8;  // numbers that stay side by side
      c10::BFloat16* placed = reinterpret_cast<c10::BFloat16*>(to);
      for (int64_t i = 0; i < stride; i += kRun) {
        const int64_t d = i / kCodes * kCodes + place_of(i % kCodes);
        const int64_t count = smaller(kRun, call.head_dim - d);
        if (count > 0) std::memcpy(static_cast<void*>(placed + i), from + d, 2 * count);
      }
      if constexpr (std::is_same_v<RowElement<T>, int16_t>) {
        float numbers[kMostWords];
        for (int64_t i = 0; i < stride; i += kWide) store_part(numbers + i, load_part(placed + i));
        words[r] = to_words(numbers, stride, to);
      }
    } else if constexpr (ElementsOf<T>::kCodes) {
      dispatch_element(call.type, [&](auto zero) {
        using From = decltype(zero);
        if constexpr (!std::is_same_v<From, double>) {  // codes lie in the order of floats
          load_query<float>(static_cast<const From*>(call.query) + offset, call.head_dim, to);
        }
      });
    } else {
      load_query<T>(static_cast<const T*>(call.query) + offset, call.head_dim, to);
    }
  }
}

struct RowState {
  float* top;     // largest score so far
  float* total;   // sum of exp(score - top)
  float* shrink;  // by what this tile's larger top scales the earlier sums
};

// The memory of one task.
template <typename T>
struct Rows {
  RowElement<T>* queries;
  WordRow* words;
  float* sums;
  RowState state;
};

// What the tasks of a thread have in turn, and the memory of each.
template <typename T>
struct Scratch {
  float* scores;
  float* bias;
  int64_t sums_stride;
  float* next;

  Scratch(const PagedAttention& call, void* memory)
      : sums_stride(padded_values(call)), next(static_cast<float*>(memory)) {
    scores = take(4 * kKeys);
    bias = take(kKeys);
  }

  Rows<T> rows(const PagedAttention& call, int64_t count) {
    auto* queries = reinterpret_cast<RowElement<T>*>(take(count * padded_dim(call)));
    auto* words = reinterpret_cast<WordRow*>(take(2 * count));
    float* sums = take(count * sums_stride);
    return {queries, words, sums, {take(count), take(count), take(count)}};
  }

 private:
  float* take(int64_t floats) {
    float* taken = next;
    next += round_up(floats, kLanes);
    return taken;
  }
};

// The tile whose rows are fetched meanwhile; no keys for none.
struct Upcoming {
  Tile tile;
  int64_t key_head;
};

// Has the pages of what comes next translated, all at once: a prefetch holds up what follows it
// until the page tables have been walked, and walks overlap only where one follows the other.
// Without this, walks took a quarter of the time of bf16 pages.
void translate(const Ahead& ahead) {
  constexpr int64_t kPage = 4096;
  for (const char* page = ahead.next; page < ahead.end; page += kPage) {
    __builtin_prefetch(page, 0, 1);
  }
}

template <int NR, typename T>
void attend_rows(const PagedAttention& call, const PagedAttentionTask& task, const Tile& tile,
                 const Upcoming& next, int64_t first, const Scratch<T>& scratch,
                 const Rows<T>& rows) {
  using Page = PageElement<T>;
  const int64_t head = task.key_head;
  float* scores = scratch.scores;
  const RowState& state = rows.state;
  const Page* values = value_row<Page>(call, tile, head);
  const auto keys_ahead = [&](const Tile& of, int64_t of_head) {
    return ahead_of(key_row<Page>(call, of, of_head), call.head_dim, call.key_stride[2], of.keys);
  };
  const auto values_ahead = [&](const Tile& of, int64_t of_head) {
    return ahead_of(value_row<Page>(call, of, of_head), call.value_dim, call.value_stride[2],
                    of.keys);
  };
  const Ahead next_keys = keys_ahead(next.tile, next.key_head);
  const Ahead next_values = values_ahead(next.tile, next.key_head);
  translate(next_keys);
  translate(next_values);
  // This tile's values once more: the processor drops what it has no room for, and they come next.
  dot_keys<NR, T>(rows.queries + first * padded_dim(call), padded_dim(call), rows.words + first,
                  key_row<Page>(call, tile, head), call.key_stride[2], tile.keys, call.head_dim,
                  scores, next_keys, next.tile.keys > 0 ? values_ahead(tile, head) : Ahead{});
  Weighing how{static_cast<float>(call.scale), call.key_bias ? scratch.bias : nullptr, 1.0f};
  if constexpr (ElementsOf<T>::kCodes) {
    how.scale *= scale_of(call.key_scales, call.key_scale_stride, tile, head);
    how.times = scale_of(call.value_scales, call.value_scale_stride, tile, head);
  }
  weigh_rows<NR>(call, call.seq_lens[task.batch], task.first_row + first, tile, how, scores,
                 state.top + first, state.total + first, state.shrink + first);
  float* sums = rows.sums + first * scratch.sums_stride;
  add_weighted<NR, T>(scores, values, call.value_stride[2], tile.keys, call.value_dim, sums,
                      scratch.sums_stride, state.shrink + first, next_values);
}

// Sums of columns in their own order instead of that of load_two.
template <typename Page>
void sort_columns(const PagedAttention& call, float* sums) {
  for (int64_t c = 0; c < call.value_dim; c += kStep) {
    float sorted[kStep];
    for (int i = 0; i < kStep; ++i) sorted[element_in<Page>(i)] = sums[c + i];
    std::memcpy(sums + c, sorted, sizeof sorted);
  }
}

// Divides by the normaliser and stores a row of the result and its lse.
void finish_row(const PagedAttention& call, const PagedAttentionTask& task, int64_t row,
                float* sums, float top, float total) {
  const float factor = total == 0.0f ? 0.0f : 1.0f / total;
  for (int64_t d = 0; d < call.value_dim; ++d) sums[d] *= factor;
  const int64_t heads = call.key_heads * call.group;
  const int64_t head = task.key_head * call.group + row % call.group;
  const int64_t index = (task.batch * heads + head) * call.queries + row / call.group;
  dispatch_element(call.type, [&](auto zero) {
    using Out = decltype(zero);
    if constexpr (!std::is_same_v<Out, double>) {
      store_row(static_cast<Out*>(call.out) + index * call.value_dim, sums, call.value_dim);
    }
  });
  static_cast<float*>(call.lse)[index] = total == 0.0f ? kNone : top + __builtin_logf(total);
}

// A task on its way through its tiles.
template <typename T>
struct Progress {
  const PagedAttentionTask* task;
  Rows<T> rows;
  Walk walk;
  Tile tile;  // the present one; no keys at the end
  Tile next;

  void begin(const PagedAttention& call, const PagedAttentionTask& of, Scratch<T>* scratch) {
    task = &of;
    rows = scratch->rows(call, of.rows);
    walk = Walk(call, of);
    load_queries<T>(call, of, rows.queries, rows.words);
    std::memset(rows.sums, 0, static_cast<size_t>(of.rows * scratch->sums_stride) * sizeof(float));
    for (int64_t r = 0; r < of.rows; ++r) {
      rows.state.top[r] = kNone;
      rows.state.total[r] = 0.0f;
    }
    advance();
    advance();
  }

  void advance() {
    tile = next;
    if (!walk.next(&next)) next = Tile{};
  }
};

// The present tile for all rows of a task.
template <typename T>
void attend_tile(const PagedAttention& call, const Progress<T>& progress, Upcoming ahead,
                 const Scratch<T>& scratch) {
  const PagedAttentionTask& task = *progress.task;
  const Tile& tile = progress.tile;
  const int64_t length = call.seq_lens[task.batch];
  if (call.key_bias) load_bias(call, tile, task.key_head, scratch.bias);
  for (int64_t r = 0; r < task.rows;) {
    const int64_t step = task.rows - r >= 4 ? 4 : task.rows - r >= 2 ? 2 : 1;
    // Rows ascend in position, so their spans do: the last one's end and the first one's start.
    Span span = span_of(call, length, task.first_row + r);
    const Span last = span_of(call, length, task.first_row + r + step - 1);
    span.high = last.high;
    span.sinks = last.sinks;
    if (!span.misses(tile.position, tile.keys)) {
      if (step == 4) {
        attend_rows<4, T>(call, task, tile, ahead, r, scratch, progress.rows);
      } else if (step == 2) {
        attend_rows<2, T>(call, task, tile, ahead, r, scratch, progress.rows);
      } else {
        attend_rows<1, T>(call, task, tile, ahead, r, scratch, progress.rows);
      }
      ahead.tile.keys = 0;  // once is enough
    }
    r += step;
  }
}

template <typename T>
void finish_task(const PagedAttention& call, const Progress<T>& progress, int64_t sums_stride,
                 float* partial) {
  const PagedAttentionTask& task = *progress.task;
  const RowState& state = progress.rows.state;
  for (int64_t r = 0; r < task.rows; ++r) {
    float* sums = progress.rows.sums + r * sums_stride;
    sort_columns<PageElement<T>>(call, sums);
    if (task.partial < 0) {
      finish_row(call, task, task.first_row + r, sums, state.top[r], state.total[r]);
    } else {
      float* to = partial + (task.partial + r) * (call.value_dim + 2);
      std::memcpy(to, sums, static_cast<size_t>(call.value_dim) * sizeof(float));
      to[call.value_dim] = state.top[r];
      to[call.value_dim + 1] = state.total[r];
    }
  }
}

// Positions outside, tasks inside: a tile that several tasks share comes from memory for the first
// and from the cache for the others. What a task computes does not depend on its company.
template <typename T>
void run_tasks(const PagedAttention& call, const PagedAttentionTask* tasks, int64_t count,
               const PagedAttentionTask* after, void* memory, float* partial) {
  Scratch<T> scratch(call, memory);
  Progress<T> all[kCascadeTasks];
  for (int64_t i = 0; i < count; ++i) all[i].begin(call, tasks[i], &scratch);
  const int64_t key_head = tasks->key_head;
  for (;;) {
    int64_t position = INT64_MAX;
    for (int64_t i = 0; i < count; ++i) {
      if (all[i].tile.keys > 0) position = smaller(position, all[i].tile.position);
    }
    if (position == INT64_MAX) break;
    Tile fetched{};
    for (int64_t i = 0; i < count; ++i) {
      Progress<T>& one = all[i];
      if (one.tile.keys == 0 || one.tile.position != position) continue;
      Upcoming ahead{one.next, key_head};
      if (one.next.block == fetched.block && one.next.position == fetched.position) {
        ahead.tile.keys = 0;  // no keys
      }
      if (one.next.keys > 0) {
        fetched = one.next;
      } else if (after && i == 0) {
        Walk walk(call, *after);
        if (walk.next(&ahead.tile)) ahead.key_head = after->key_head;
      }
      attend_tile(call, one, ahead, scratch);
      one.advance();
    }
  }
  for (int64_t i = 0; i < count; ++i) finish_task(call, all[i], scratch.sums_stride, partial);
}

void merge_task(const PagedAttention& call, const PagedAttentionTask& task, int64_t splits,
                int64_t stride, float* sums, const float* partial) {
  const int64_t dim = call.value_dim;
  for (int64_t r = 0; r < task.rows; ++r) {
    const float* rows = partial + (task.partial + r) * (dim + 2);
    float top = kNone;
    for (int64_t s = 0; s < splits; ++s) {
      const float other = rows[s * stride * (dim + 2) + dim];
      top = other > top ? other : top;
    }
    const float shift = top == kNone ? 0.0f : top;
    float total = 0.0f;
    for (int64_t d = 0; d < dim; ++d) sums[d] = 0.0f;
    for (int64_t s = 0; s < splits; ++s) {
      const float* row = rows + s * stride * (dim + 2);
      float factors[kLanes];
      store_lanes(factors, exp_lanes(f32x16(row[dim] - shift)));
      const float factor = row[dim] == top ? 1.0f : factors[0];
      for (int64_t d = 0; d < dim; ++d) sums[d] += row[d] * factor;
      total += row[dim + 1] * factor;
    }
    finish_row(call, task, task.first_row + r, sums, top, total);
  }
}

// fn receives T{} of the loops: the dtype of query and pages, or what Coded says.
template <typename Fn>
void dispatch_pages(const PagedAttention& call, const Fn& fn) {
  if (!call.key_scales) return dispatch_element(call.type, fn);
  dispatch_codes(call.codes, [&](auto zero) {
    using Code = decltype(zero);
#if defined(__AVX512BF16__)
    const bool fits = std::is_same_v<Code, Float8> || call.head_dim <= kMostWords;
    if (call.type == ElementType::kBFloat16 && fits) return fn(Coded<Code, true>{});
#endif
    fn(Coded<Code, false>{});
  });
}

}  // namespace

void paged_attention_scratch(const PagedAttention& call, int64_t tasks, int64_t rows,
                             int64_t* floats) {
  *floats = 5 * kKeys +
            tasks * (rows * (padded_dim(call) + padded_values(call)) + 5 * round_up(rows, kLanes));
}

void paged_attention_tasks(const PagedAttention& call, const PagedAttentionTask* tasks,
                           int64_t count, const PagedAttentionTask* after, void* scratch,
                           void* partial) {
  dispatch_pages(call, [&](auto zero) {
    using T = decltype(zero);
    if constexpr (std::is_same_v<T, double>) {
      for (int64_t i = 0; i < count; ++i) {
        run_double(call, tasks[i], static_cast<double*>(scratch));
      }
    } else {
      run_tasks<T>(call, tasks, count, after, scratch, static_cast<float*>(partial));
    }
  });
}

void paged_attention_merge(const PagedAttention& call, const PagedAttentionTask& task,
                           int64_t splits, int64_t stride, void* scratch, const void* partial) {
  merge_task(call, task, splits, stride, static_cast<float*>(scratch),
             static_cast<const float*>(partial));
}

}  // namespace winnow::CPU_CAPABILITY
