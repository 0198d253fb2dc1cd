// winnow::paged_attention on the CPU. A task is the rows of one key head against a fixed number of
// keys: few queries over a long cache still fill every core, and because the split depends on
// the shape alone, the result does not depend on the number of threads. Tasks of several sequences
// that share blocks run together (a cascade), so that a shared block is read once for all.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <new>
#include <optional>
#include <tuple>
#include <vector>

#include "common/checks.h"
#include "common/parallel.h"
#include "common/tensors.h"
#include "kvcache/paged_attention_call.h"

namespace winnow {
namespace {

// Keys of a split: long enough that merging costs nothing, short enough for 64 cores on one
// sequence.
constexpr int64_t kSplitKeys = 1024;
// A thread is worth waking for this many multiply-adds, about 20 µs.
constexpr int64_t kThreadWork = 1 << 18;

struct FreeAligned {
  void operator()(float* p) const { ::operator delete[](p, std::align_val_t{64}); }
};
using AlignedFloats = std::unique_ptr<float[], FreeAligned>;

AlignedFloats aligned_floats(int64_t count) {
  return AlignedFloats(static_cast<float*>(
      ::operator new[](static_cast<size_t>(count) * sizeof(float), std::align_val_t{64})));
}

// Ascending, so that no block counts twice; -1 names none.
void check_indices(const Tensor& indices, const Tensor& seq_lens, int64_t block_size,
                   int64_t key_heads, int64_t head_stride) {
  const auto* base = static_cast<const int32_t*>(indices.data_ptr());
  const auto* lengths = static_cast<const int32_t*>(seq_lens.data_ptr());
  const int64_t count = indices.size(indices.dim() - 1);
  const int64_t heads = head_stride == 0 ? 1 : key_heads;
  for (int64_t b = 0; b < seq_lens.size(0); ++b) {
    const int64_t used = (lengths[b] + block_size - 1) / block_size;
    for (int64_t h = 0; h < heads; ++h) {
      const int32_t* row = base + b * indices.stride(0) + h * head_stride;
      int64_t before = -1;
      for (int64_t i = 0; i < count; ++i) {
        if (row[i] == -1) continue;
        WINNOW_CHECK(row[i] >= 0 && row[i] < used, "block_indices: expected -1 or 0 <= block < ",
                     used, " (the blocks of row ", b, "), got ", row[i]);
        WINNOW_CHECK(row[i] > before, "block_indices: expected ascending blocks, got ", row[i],
                     " after ", before, " in row ", b);
        before = row[i];
      }
    }
  }
}

// The tasks of a call. Cascades are runs of tasks, [cascades[i], cascades[i + 1]), that a thread
// takes through the keys together; merges join the splits of a row.
struct Plan {
  std::vector<PagedAttentionTask> tasks;
  std::vector<int64_t> cascades;
  std::vector<PagedAttentionTask> merges;
  std::vector<int64_t> merge_splits;
  int64_t partial_rows = 0;
  int64_t longest = 1;  // tasks of a cascade
};

// Batch rows with the same first block in split `begin` next to each other: rows that share blocks
// are forks, and forks share a beginning. Lists differ in length and choice, so that the table
// decides for them.
void order_by_block(const PagedAttention& call, int64_t begin, std::vector<int64_t>* rows,
                    std::vector<int32_t>* first_block) {
  const int64_t entry = call.block_indices ? 0 : begin;
  const auto block = [&](int64_t b) {
    return call.seq_lens[b] > entry * call.block_size
               ? call.block_table[b * call.table_stride + entry]
               : -1;
  };
  std::stable_sort(rows->begin(), rows->end(),
                   [&](int64_t a, int64_t b) { return block(a) < block(b); });
  first_block->clear();
  for (const int64_t b : *rows) first_block->push_back(block(b));
}

// Splits depend on the lengths alone, so that neither threads nor other rows of the batch change a
// result; which tasks go together is free.
Plan make_plan(const PagedAttention& call, int64_t batch, int64_t list_length, int64_t split,
               int64_t threads) {
  const int64_t rows = call.queries * call.group;
  Plan plan;
  std::vector<int64_t> splits(static_cast<size_t>(batch), 1);
  std::vector<int64_t> partial(static_cast<size_t>(batch), -1);  // of the row's first task
  const auto entries_of = [&](int64_t b) {
    return call.block_indices ? list_length
                              : (call.seq_lens[b] + call.block_size - 1) / call.block_size;
  };
  int64_t most_splits = 1;
  int64_t tasks = 0;
  for (int64_t b = 0; b < batch; ++b) {
    const auto i = static_cast<size_t>(b);
    if (split > 0) splits[i] = std::max<int64_t>(1, (entries_of(b) + split - 1) / split);
    most_splits = std::max(most_splits, splits[i]);
    tasks += splits[i];
    if (splits[i] == 1) continue;
    partial[i] = plan.partial_rows;
    plan.partial_rows += call.key_heads * splits[i] * rows;
    for (int64_t h = 0; h < call.key_heads; ++h) {
      plan.merges.push_back({b, h, 0, rows, 0, 0, partial[i] + h * splits[i] * rows});
      plan.merge_splits.push_back(splits[i]);
    }
  }
  tasks *= call.key_heads * ((rows - 1) / kAttentionRows + 1);
  plan.tasks.reserve(static_cast<size_t>(tasks));
  // Many queries are worth more than the bytes of a block, and their sums would not fit together.
  const int64_t most =
      rows <= kAttentionRows
          ? std::min({kCascadeTasks, kCascadeRows / rows, std::max<int64_t>(1, tasks / threads)})
          : 1;
  std::vector<int64_t> order;
  std::vector<int32_t> first_block;
  for (int64_t s = 0; s < most_splits; ++s) {
    order.clear();
    for (int64_t b = 0; b < batch; ++b) {
      if (splits[static_cast<size_t>(b)] > s) order.push_back(b);
    }
    if (most > 1) order_by_block(call, s * split, &order, &first_block);
    for (int64_t h = 0; h < call.key_heads; ++h) {
      for (size_t i = 0; i < order.size(); ++i) {
        const int64_t b = order[i];
        const int64_t count = splits[static_cast<size_t>(b)];
        const int64_t entries = entries_of(b);
        for (int64_t first = 0; first < rows; first += kAttentionRows) {
          const auto place = static_cast<int64_t>(plan.tasks.size());
          const bool joins = most > 1 && i > 0 && first_block[i] >= 0 &&
                             first_block[i] == first_block[i - 1] &&
                             place - plan.cascades.back() < most;
          if (!joins) plan.cascades.push_back(place);
          plan.longest = std::max(plan.longest, place + 1 - plan.cascades.back());
          const int64_t begin = count > 1 ? s * split : 0;
          const int64_t end = count > 1 ? std::min(entries, begin + split) : entries;
          plan.tasks.push_back(
              {b, h, first, std::min(kAttentionRows, rows - first), begin, end,
               count > 1 ? partial[static_cast<size_t>(b)] + (h * count + s) * rows : -1});
        }
      }
    }
  }
  plan.cascades.push_back(static_cast<int64_t>(plan.tasks.size()));
  return plan;
}

void attend(const PagedAttention& call, int64_t batch, int64_t list_length) {
  const int64_t rows = call.queries * call.group;
  if (batch == 0 || rows == 0 || call.key_heads == 0) return;
  // Many queries fill the cores by themselves, and their partial results would be large.
  const bool split = rows <= kAttentionRows && call.type != ElementType::kDouble;
  const auto available = static_cast<int64_t>(torch::stable::get_num_threads());
  const Plan plan =
      make_plan(call, batch, list_length,
                split ? std::max<int64_t>(1, kSplitKeys / call.block_size) : 0, available);
  const AlignedFloats partial = aligned_floats(plan.partial_rows * (call.value_dim + 2));

  int64_t keys = 0;
  for (const PagedAttentionTask& task : plan.tasks) {
    keys += (task.end - task.begin) * call.block_size;
  }
  const int64_t work = keys * std::min(rows, kAttentionRows) * (call.head_dim + call.value_dim);
  const auto count = static_cast<int64_t>(plan.cascades.size()) - 1;
  const int64_t worth = kSpreadAnyWork ? available : work / kThreadWork;
  const int64_t threads = std::max<int64_t>(1, std::min({available, count, worth}));
  int64_t scratch_floats = 0;
  WINNOW_SIMD(paged_attention_scratch)(call, plan.longest, std::min(rows, kAttentionRows),
                                       &scratch_floats);
  const int64_t stride = (scratch_floats + 15) / 16 * 16 * 2;  // room for doubles
  const AlignedFloats scratch = aligned_floats(threads * stride);

  // Sequences differ in length and causal tiles in width, so threads take the next few tasks when
  // they are done. Which thread computes a task does not change it.
  const auto for_each = [&](int64_t total, const auto& work_on) {
    std::atomic<int64_t> next{0};
    const int64_t chunk = std::max<int64_t>(1, total / (8 * threads));
    parallel_for(0, std::min(threads, total), 1, [&](int64_t begin, int64_t end) {
      for (int64_t thread = begin; thread < end; ++thread) {
        float* memory = scratch.get() + thread * stride;
        for (int64_t i = next.fetch_add(chunk); i < total; i = next.fetch_add(chunk)) {
          const int64_t stop = std::min(i + chunk, total);
          for (int64_t k = i; k < stop; ++k) work_on(k, k + 1 < stop, memory);
        }
      }
    });
  };
  const auto run = WINNOW_SIMD(paged_attention_tasks);
  for_each(count, [&](int64_t i, bool more, float* memory) {
    const int64_t* cascade = &plan.cascades[static_cast<size_t>(i)];
    const PagedAttentionTask* tasks = plan.tasks.data();
    run(call, tasks + cascade[0], cascade[1] - cascade[0], more ? tasks + cascade[1] : nullptr,
        memory, partial.get());
  });
  const auto merge = WINNOW_SIMD(paged_attention_merge);
  for_each(static_cast<int64_t>(plan.merges.size()), [&](int64_t i, bool, float* memory) {
    const PagedAttentionTask& rows_of = plan.merges[static_cast<size_t>(i)];
    merge(call, rows_of, plan.merge_splits[static_cast<size_t>(i)], rows_of.rows, memory,
          partial.get());
  });
}

std::tuple<Tensor, Tensor> paged_attention(
    const Tensor& query, const Tensor& key_pages, const Tensor& value_pages,
    const Tensor& block_table, const Tensor& seq_lens, bool causal,
    std::optional<Tensor> block_indices, std::optional<int64_t> window, int64_t sinks,
    std::optional<Tensor> key_bias, std::optional<double> scale, std::optional<Tensor> key_scales,
    std::optional<Tensor> value_scales) {
  check_query(query, check_cpu);
  const bool quantised =
      check_pages_and_scales(query, key_pages, value_pages, key_scales, value_scales, check_cpu);
  check_query_and_keys(query, key_pages, block_table, seq_lens, window, sinks, check_cpu);
  check_rows(key_pages, block_table, seq_lens);
  const int64_t batch = query.size(0);
  const int64_t heads = query.size(1);
  const int64_t key_heads = key_pages.size(1);
  PagedAttention call = describe_query_and_keys(query, key_pages, block_table, seq_lens, causal,
                                                window, sinks, scale);
  if (quantised) {
    call.codes = code_type("key_pages", key_pages);
    call.key_scales = static_cast<const float*>(key_scales->data_ptr());
    call.value_scales = static_cast<const float*>(value_scales->data_ptr());
    for (int64_t d = 0; d < 2; ++d) {
      call.key_scale_stride[d] = key_scales->stride(d);
      call.value_scale_stride[d] = value_scales->stride(d);
    }
  }
  int64_t list_length = 0;
  if (block_indices) {
    const Tensor& indices = *block_indices;
    const bool shared = check_block_indices(indices, batch, key_heads, check_cpu);
    static const int32_t kNoBlock = -1;  // an empty selection has no memory, but it is a selection
    call.block_indices =
        indices.numel() > 0 ? static_cast<const int32_t*>(indices.data_ptr()) : &kNoBlock;
    call.indices_stride[0] = indices.stride(0);
    call.indices_stride[1] = shared ? 0 : indices.stride(1);
    list_length = indices.size(indices.dim() - 1);
    check_indices(indices, seq_lens, call.block_size, key_heads, call.indices_stride[1]);
  }
  if (key_bias) {
    check_key_bias(*key_bias, key_pages, query, check_cpu, call.bias_stride);
    call.key_bias = key_bias->data_ptr();
    call.bias_type = element_type(*key_bias);
  }

  const int64_t queries = query.size(2);
  const int64_t value_dim = value_pages.size(3);
  Tensor out = empty({batch, heads, queries, value_dim}, query.scalar_type(), query);
  Tensor lse = empty({batch, heads, queries}, statistics_dtype(query), query);
  call.value_pages = value_pages.data_ptr();
  for (int64_t d = 0; d < 3; ++d) call.value_stride[d] = value_pages.stride(d);
  call.value_dim = value_dim;
  call.out = out.data_ptr();
  call.lse = lse.data_ptr();
  attend(call, batch, list_length);
  return {out, lse};
}

}  // namespace
}  // namespace winnow

STABLE_TORCH_LIBRARY_IMPL(winnow, CPU, m) {
  m.impl("paged_attention", TORCH_BOX(&winnow::paged_attention));
}
