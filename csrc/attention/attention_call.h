// An attention problem as the CUDA kernels are told it.
#pragma once

#include "attention/arguments.h"
#include "attention/attention_walk.cuh"

namespace winnow {
namespace {

// Whether every row that is read begins at a multiple of 16 bytes and consists of such pieces.
template <typename T>
bool in_pieces(const Tensor& tensor, const Source& source) {
  bool fits = reinterpret_cast<uintptr_t>(source.data) % 16 == 0 && tensor.size(3) % kPiece<T> == 0;
  fits = fits && (tensor.size(0) <= 1 || source.batch % kPiece<T> == 0);
  fits = fits && (tensor.size(1) <= 1 || source.head % kPiece<T> == 0);
  return fits && (tensor.size(2) <= 1 || source.row % kPiece<T> == 0);
}

template <typename T>
DeviceRows<T> rows_of(const Tensor& tensor, const Source& source) {
  return {global<const T>(tensor), source.batch, source.head, source.row};
}

template <typename T>
AttentionCall<T> call_of(const AttentionProblem& problem, const Operands& operands) {
  const Tensor& slot_key = operands.slot_key ? *operands.slot_key : operands.key;
  const Tensor& slot_value = operands.slot_value ? *operands.slot_value : operands.value;
  const Pattern& pattern = problem.pattern;
  WINNOW_CHECK(pattern.rows < (int64_t{1} << 30) && pattern.slots < (int64_t{1} << 30),
               "query: expected fewer than 2^30 rows on a GPU, got ", shape_of(operands.query));
  AttentionCall<T> call = {};
  call.pattern.rows = pattern.rows;
  call.pattern.chunk_size = pattern.chunk_size;
  call.pattern.slots = pattern.slots;
  call.pattern.initial_slots = pattern.initial_slots;
  call.pattern.slots_per_chunk = pattern.slots_per_chunk;
  call.pattern.lookback = pattern.lookback;
  call.pattern.causal = pattern.causal;
  call.pattern.interleaved = pattern.interleaved;
  call.pattern.sequences = pattern.sequences;
  if (operands.sequences) {
    call.pattern.row_begin = global<const int64_t>(*operands.sequences);
    call.pattern.slot_begin = call.pattern.row_begin + (pattern.sequences + 1);
  }
  call.query = rows_of<T>(operands.query, problem.query);
  call.key = rows_of<T>(operands.key, problem.key);
  call.value = rows_of<T>(operands.value, problem.value);
  call.slot_key = rows_of<T>(slot_key, problem.slot_key);
  call.slot_value = rows_of<T>(slot_value, problem.slot_value);
  call.batch = problem.batch;
  call.query_heads = problem.query_heads;
  call.kv_heads = problem.kv_heads;
  call.dim = static_cast<int>(problem.dim);
  call.steps = ceil_div(call.dim, kDepth);
  call.vectors =
      in_pieces<T>(operands.query, problem.query) && in_pieces<T>(operands.key, problem.key) &&
      in_pieces<T>(operands.value, problem.value) && in_pieces<T>(slot_key, problem.slot_key) &&
      in_pieces<T>(slot_value, problem.slot_value);
  call.scale = static_cast<Accumulator<T>>(problem.scale);
  return call;
}

// fn receives T{} and the padded head dimension as an integral constant: 64, 128 or 256.
template <typename Fn>
void dispatch_shape(const AttentionProblem& problem, const Tensor& query, const Fn& fn) {
  dispatch_floating(query, [&](auto zero) {
    if constexpr (std::is_same_v<decltype(zero), double>) {
      fn(zero, std::integral_constant<int, 256>{});  // correct for a gradient check, no more
    } else if (problem.dim <= 64) {
      fn(zero, std::integral_constant<int, 64>{});
    } else if (problem.dim <= 128) {
      fn(zero, std::integral_constant<int, 128>{});
    } else {
      fn(zero, std::integral_constant<int, 256>{});
    }
  });
}

}  // namespace
}  // namespace winnow
