#pragma once

#include <cstdint>

#include "common/cpu_capability.h"
#include "common/element_type.h"
#include "kvcache/codes.h"

namespace winnow {

// A call of paged_attention as raw pointers; strides in elements, last dimensions contiguous.
struct PagedAttention {
  ElementType type;  // of query and out, and of pages without scales
  const void* query;
  int64_t query_stride[3];  // batch, head, position
  const void* key_pages;
  int64_t key_stride[3];  // block, head, slot
  const void* value_pages;
  int64_t value_stride[3];
  const float* key_scales;      // of quantised pages, else null; so are those of the values
  int64_t key_scale_stride[2];  // block, head
  const float* value_scales;
  int64_t value_scale_stride[2];
  CodeType codes;
  const int32_t* block_table;
  int64_t table_stride;
  const int32_t* seq_lens;
  const int32_t* block_indices;  // or null: every block of the row
  int64_t indices_stride[2];     // batch, key head
  const void* key_bias;          // or null
  ElementType bias_type;
  int64_t bias_stride[3];  // block, head, slot
  int64_t queries;         // T
  int64_t group;           // query heads per key head
  int64_t key_heads;
  int64_t block_size;
  int64_t head_dim;
  int64_t value_dim;
  bool causal;
  int64_t window;  // 0: none
  int64_t sinks;
  double scale;
  void* out;  // (B, Hq, T, value_dim)
  void* lse;  // (B, Hq, T) float, or double for double
};

// The rows of one key head (row = position * group + head in group) against the list entries
// [begin, end). Without `partial` they are all entries and the result is final; else it goes to
// partial: per row value_dim sums, the maximum and the normaliser.
struct PagedAttentionTask {
  int64_t batch;
  int64_t key_head;
  int64_t first_row;
  int64_t rows;
  int64_t begin;
  int64_t end;
  int64_t partial;  // index of the first row in the partial results, or -1
};

constexpr int64_t kAttentionRows = 64;  // rows of a task: scores and sums stay in the L2 cache
// Tasks that go through the keys together, so that a block which several of them share is read from
// memory once. Their queries and sums stay in the L2 cache too.
constexpr int64_t kCascadeTasks = 64;
constexpr int64_t kCascadeRows = 256;

// Floats of scratch memory that `tasks` tasks of up to `rows` rows need together, 64-byte aligned;
// of doubles for double.
WINNOW_SIMD_DECLARE(paged_attention_scratch, const PagedAttention& call, int64_t tasks,
                    int64_t rows, int64_t* floats)

// Runs `count` tasks of one key head, at most kCascadeTasks. `after`, or null, is the first task
// that this thread will be given next: its first keys are fetched at the end of these.
WINNOW_SIMD_DECLARE(paged_attention_tasks, const PagedAttention& call,
                    const PagedAttentionTask* tasks, int64_t count, const PagedAttentionTask* after,
                    void* scratch, void* partial)

// Joins the partial results of the same rows, `splits` of them `stride` rows apart, in order.
WINNOW_SIMD_DECLARE(paged_attention_merge, const PagedAttention& call,
                    const PagedAttentionTask& task, int64_t splits, int64_t stride, void* scratch,
                    const void* partial)

}  // namespace winnow
