// The attention operators on the GPU, which differ from the CPU's in the loops behind them alone,
// in one unit: each would cost the compiler its headers. And the forward of any pattern, the device
// of operands, and where packed sequences begin. Lengths stay on the device, so they are not
// checked there: they are brought into range, so that nothing outside of the tensors is read.
#include "attention/run.h"

#include "attention/attention_call.h"
#include "attention/attention_forward_kernel.cuh"
#include "attention/block_diagonal_attention.h"
#include "attention/cat_attention.h"
#include "attention/chunk_attention.h"
#include "attention/pattern.h"
#include "common/device.h"

namespace winnow {
namespace {

// One warp: running maxima of the ends, running sums of the slots that the sequences own.
template <typename Index>
WINNOW_KERNEL(kWarp)
sequence_table(Global<const Index> cu_seqlens, int64_t stride, int64_t count, int64_t rows,
               int64_t slots, int64_t chunk_size, int64_t initial_slots, int64_t slots_per_chunk,
               Global<int64_t> row_begin, Global<int64_t> slot_begin) {
  int64_t end_so_far = 0;
  int64_t slots_so_far = 0;
  if (lane_index() == 0) {
    row_begin[0] = 0;
    slot_begin[0] = 0;
  }
  for (int64_t base = 1; base < count; base += kWarp) {
    const int64_t i = base + lane_index();
    int64_t end = rows;
    if (i < count - 1) end = static_cast<int64_t>(static_cast<Index>(cu_seqlens[i * stride]));
    end = larger(end_so_far, smaller(end, rows));
    for (int offset = 1; offset < kWarp; offset *= 2) {
      const int64_t before = shuffle_up(kFullWarp, end, offset);
      if (lane_index() >= offset) end = larger(end, before);
    }
    const int64_t previous = shuffle_up(kFullWarp, end, 1);
    const int64_t begin = lane_index() == 0 ? end_so_far : previous;
    const int64_t chunks = ceil_div(end - begin, chunk_size);
    int64_t owned = smaller(slots, initial_slots + larger(chunks - 1, 0) * slots_per_chunk);
    if (i >= count) owned = 0;
    for (int offset = 1; offset < kWarp; offset *= 2) {
      const int64_t before = shuffle_up(kFullWarp, owned, offset);
      if (lane_index() >= offset) owned += before;
    }
    if (i < count) {
      row_begin[i] = end;
      slot_begin[i] = smaller(slots, slots_so_far + owned);
    }
    end_so_far = shuffle(kFullWarp, end, kWarp - 1);
    slots_so_far = smaller(slots, slots_so_far + shuffle(kFullWarp, owned, kWarp - 1));
  }
}

}  // namespace

void check_operand_device(const char* argument, const Tensor& tensor) {
  check_device(argument, tensor);
}

Tensor read_sequences(const Tensor& cu_seqlens, const Pattern& options) {
  const int64_t count = cu_seqlens.size(0);
  const Stream stream(cu_seqlens);
  Tensor table = empty({2, count}, ScalarType::Long, cu_seqlens);
  const auto row_begin = global<int64_t>(table);
  const auto run = [&](auto index) {
    using Index = decltype(index);
    launch("sequence_table", sequence_table<Index>, {1}, kWarp, stream,
           global<const Index>(cu_seqlens), cu_seqlens.stride(0), count, options.rows,
           options.slots, options.chunk_size, smaller(options.initial_slots, options.slots),
           smaller(options.slots_per_chunk, options.slots), row_begin, row_begin + count);
  };
  cu_seqlens.scalar_type() == ScalarType::Int ? run(int32_t{}) : run(int64_t{});
  return table;
}

std::tuple<Tensor, Tensor> run_forward(const AttentionProblem& problem, const Operands& operands) {
  const Tensor& query = operands.query;
  const Stream stream(query);
  Tensor out = empty(shape(query), query.scalar_type(), query);
  Tensor lse = empty(leading_shape(query), statistics_dtype(query), query);
  if (lse.numel() == 0) return {out, lse};
  dispatch_shape(problem, query, [&](auto zero, auto dim) {
    using T = decltype(zero);
    using Shape = ForwardShape<T, dim()>;
    const int64_t tiles = ceil_div<int64_t>(problem.pattern.rows, Shape::kRows);
    launch("attention_forward", attention_forward<T, dim()>,
           {tiles * problem.batch * problem.query_heads, 1, Shape::kSharedBytes}, Shape::kThreads,
           stream, call_of<T>(problem, operands), global<T>(out), global<Accumulator<T>>(lse));
  });
  return {out, lse};
}

}  // namespace winnow

WINNOW_DEVICE_OPERATORS(m) {
  m.impl("cat_attention", TORCH_BOX(&winnow::cat_attention));
  m.impl("cat_attention_backward", TORCH_BOX(&winnow::cat_attention_backward));
  m.impl("chunk_attention", TORCH_BOX(&winnow::chunk_attention));
  m.impl("chunk_attention_backward", TORCH_BOX(&winnow::chunk_attention_backward));
  m.impl("block_diagonal_attention", TORCH_BOX(&winnow::block_diagonal_attention));
  m.impl("block_diagonal_attention_backward",
         TORCH_BOX(&winnow::block_diagonal_attention_backward));
}
