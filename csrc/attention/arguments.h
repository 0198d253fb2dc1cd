// Arguments of the attention operators on any device, checked, as the problem that the loops and
// kernels are told.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <cmath>
#include <optional>
#include <vector>

#include "attention/problem.h"
#include "attention/run.h"
#include "common/checks.h"
#include "common/tensors.h"

namespace winnow {

constexpr int64_t kLargestDim = 256;

inline Source source_of(const Tensor& tensor) {
  return {tensor.data_ptr(), tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

// query (B, Hq, N, D)
inline void check_query(const Tensor& query) {
  check_floating("query", query);
  check_operand_device("query", query);
  check_dim("query", query, 4, "(B, Hq, N, D)");
  WINNOW_CHECK(query.size(3) >= 1 && query.size(3) <= kLargestDim,
               "query: expected a head dimension D from 1 to ", kLargestDim, ", got ",
               shape_of(query));
  check_last_contiguous("query", query);
}

// A key or value source beside the query: (B, Hkv, M, D) of the same dtype.
inline void check_source(const char* argument, const Tensor& tensor, const Tensor& query,
                         const char* layout) {
  check_dtype(argument, tensor, query.scalar_type());
  check_operand_device(argument, tensor);
  WINNOW_CHECK(
      tensor.dim() == 4 && tensor.size(0) == query.size(0) && tensor.size(3) == query.size(3),
      argument, ": expected ", layout, " with B=", query.size(0), " and D=", query.size(3),
      " as in query, got ", shape_of(tensor));
  check_last_contiguous(argument, tensor);
}

inline void check_same_shape(const char* argument, const Tensor& tensor, const char* other,
                             const Tensor& expected) {
  WINNOW_CHECK(shape(tensor) == shape(expected), argument, ": expected the shape of ", other, ", ",
               shape_of(expected), ", got ", shape_of(tensor));
}

inline void check_key_value(const Tensor& query, const Tensor& key, const Tensor& value) {
  check_query(query);
  check_source("key", key, query, "(B, Hkv, N, D)");
  check_source("value", value, query, "(B, Hkv, N, D)");
  check_same_shape("value", value, "key", key);
  WINNOW_CHECK(key.size(2) == query.size(2), "key: expected N=", query.size(2),
               " rows as in query, got ", shape_of(key));
  const int64_t query_heads = query.size(1);
  const int64_t kv_heads = key.size(1);
  WINNOW_CHECK(kv_heads > 0 ? query_heads % kv_heads == 0 : query_heads == 0,
               "key: expected a number of heads that divides the query's ", query_heads, ", got ",
               kv_heads);
}

inline void check_at_least(const char* argument, int64_t value, int64_t least) {
  WINNOW_CHECK(value >= least, argument, ": expected at least ", least, ", got ", value);
}

// A problem whose pattern is still to be filled in.
inline AttentionProblem problem_of(const Tensor& query, const Tensor& key, const Tensor& value,
                                   std::optional<double> scale) {
  AttentionProblem problem;
  problem.type = element_type(query);
  problem.batch = query.size(0);
  problem.query_heads = query.size(1);
  problem.kv_heads = key.size(1);
  problem.dim = query.size(3);
  problem.scale = scale ? *scale : 1.0 / std::sqrt(static_cast<double>(problem.dim));
  problem.pattern.rows = query.size(2);
  problem.query = source_of(query);
  problem.key = source_of(key);
  problem.value = source_of(value);
  return problem;
}

// An option at least as large as the sequence is as good as any larger one; this keeps products of
// options in range.
inline int64_t bounded_chunk(int64_t chunk_size, int64_t rows) {
  return chunk_size < rows ? chunk_size : (rows > 0 ? rows : 1);
}

// The interleaved layout's vector rows as slots.
inline void use_rows_as_slots(AttentionProblem* problem) {
  Pattern& pattern = problem->pattern;
  pattern.slots = (pattern.rows + pattern.chunk_size - 1) / pattern.chunk_size;
  pattern.slots_per_chunk = 1;
  pattern.interleaved = true;
  problem->slot_key = problem->key;
  problem->slot_value = problem->value;
  problem->slot_key.row *= pattern.chunk_size;
  problem->slot_value.row *= pattern.chunk_size;
}

// Gradients that a backward operator receives, and the results of the forward.
inline void check_gradients(const Gradients& gradients, const Tensor& query) {
  check_dtype("grad_out", gradients.grad_out, query.scalar_type());
  check_same_shape("grad_out", gradients.grad_out, "query", query);
  check_dtype("out", gradients.out, query.scalar_type());
  check_same_shape("out", gradients.out, "query", query);
  check_dtype("lse", gradients.lse, statistics_dtype(query));
  check_dtype("grad_lse", gradients.grad_lse, statistics_dtype(query));
  for (const auto& [name, tensor] :
       {std::pair{"lse", &gradients.lse}, {"grad_lse", &gradients.grad_lse}}) {
    WINNOW_CHECK(shape(*tensor) == leading_shape(query), name,
                 ": expected (B, Hq, N) as in query, ", shape_of(query), ", got ",
                 shape_of(*tensor));
  }
}

// Checked, and as the loops and kernels read them: grad_out by rows, the rest contiguous.
struct DenseGradients {
  Tensor grad_out, grad_lse, out, lse;
};

inline DenseGradients dense_gradients(const Gradients& gradients, const Tensor& query) {
  check_gradients(gradients, query);
  const Tensor& rows = gradients.grad_out;
  const bool regular = rows.size(3) <= 1 || rows.stride(3) == 1;
  return {regular ? rows : dense(rows), dense(gradients.grad_lse), dense(gradients.out),
          dense(gradients.lse)};
}

// Not initialised.
inline InputGradients empty_gradients(const Operands& operands) {
  const auto like = [](const Tensor& tensor) {
    return empty(shape(tensor), tensor.scalar_type(), tensor);
  };
  InputGradients results{like(operands.query), like(operands.key), like(operands.key), std::nullopt,
                         std::nullopt};
  if (operands.slot_key) {
    results.slot_key = like(*operands.slot_key);
    results.slot_value = like(*operands.slot_key);
  }
  return results;
}

}  // namespace winnow
