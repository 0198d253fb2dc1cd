// winnow::chunk_attention on the CPU, where the sequences can be checked.
#include "attention/chunk_attention.h"

#include <torch/csrc/stable/library.h>

namespace winnow {

Tensor read_sequences(const Tensor& cu_seqlens, const Pattern& options) {
  const bool narrow = cu_seqlens.scalar_type() == ScalarType::Int;
  const int64_t rows = options.rows;
  const int64_t slots = options.slots;
  const int64_t count = cu_seqlens.size(0);
  const int64_t stride = cu_seqlens.stride(0);
  const void* data = cu_seqlens.data_ptr();
  const auto entry = [&](int64_t i) {
    return narrow ? static_cast<const int32_t*>(data)[i * stride]
                  : static_cast<const int64_t*>(data)[i * stride];
  };
  Tensor table = empty({2, count}, ScalarType::Long, cu_seqlens);
  auto* row_begin = static_cast<int64_t*>(table.data_ptr());
  int64_t* slot_begin = row_begin + count;
  WINNOW_CHECK(entry(0) == 0, "cu_seqlens: expected to start at 0, got ", entry(0));
  row_begin[0] = slot_begin[0] = 0;
  for (int64_t i = 1; i < count; ++i) {
    const int64_t begin = row_begin[i - 1];
    const int64_t end = entry(i);
    WINNOW_CHECK(end >= begin && end <= rows,
                 "cu_seqlens: expected ascending values up to N=", rows, ", got ", end, " after ",
                 begin, " at index ", i);
    const int64_t chunks = (end - begin + options.chunk_size - 1) / options.chunk_size;
    const int64_t seen = larger(chunks - 1, 0);
    // Up to the number of slots the products below are in range; beyond it the check says what
    // the sequence needs.
    WINNOW_CHECK(options.initial_slots <= slots && (seen == 0 || options.slots_per_chunk <= slots),
                 "slot_key: expected initial_slots + (chunks - 1) * slots_per_chunk = ",
                 options.initial_slots, " + ", seen, " * ", options.slots_per_chunk,
                 " slots for the sequence that ends at index ", i, " of cu_seqlens, got M=", slots);
    row_begin[i] = end;
    slot_begin[i] = slot_begin[i - 1] + options.initial_slots + seen * options.slots_per_chunk;
    WINNOW_CHECK(slot_begin[i] <= slots, "slot_key: expected at least ", slot_begin[i],
                 " slots for the sequences of cu_seqlens up to index ", i, ", got M=", slots);
  }
  WINNOW_CHECK(row_begin[count - 1] == rows, "cu_seqlens: expected to end at N=", rows, ", got ",
               row_begin[count - 1]);
  return table;
}

}  // namespace winnow

STABLE_TORCH_LIBRARY_IMPL(winnow, CPU, m) {
  m.impl("chunk_attention", TORCH_BOX(&winnow::chunk_attention));
  m.impl("chunk_attention_backward", TORCH_BOX(&winnow::chunk_attention_backward));
}
