// Arguments of operators that read or write quantised pages.
#pragma once

#include "common/checks.h"
#include "kvcache/codes.h"

namespace winnow {
namespace {

inline bool holds_codes(const Tensor& pages) {
  return pages.scalar_type() == ScalarType::Char ||
         pages.scalar_type() == ScalarType::Float8_e4m3fn;
}

inline CodeType code_type(const char* name, const Tensor& pages) {
  WINNOW_CHECK(holds_codes(pages), name, ": expected int8 or float8_e4m3fn, got ",
               name_of(pages.scalar_type()));
  return pages.scalar_type() == ScalarType::Char ? CodeType::kInt8 : CodeType::kFloat8;
}

// Pages that hold codes come with scales, and no others do. Returns whether they do.
inline bool check_presence(const char* name, bool present, const Tensor& key_pages) {
  check_defined("key_pages", key_pages);
  const bool quantised = holds_codes(key_pages);
  WINNOW_CHECK(present == quantised, name, ": ",
               quantised ? "expected those of the quantised pages, got None"
                         : "expected None, because key_pages are not quantised (int8 or "
                           "float8_e4m3fn), got a tensor");
  return quantised;
}

inline bool check_quantised(const Tensor& query, const Tensor& key_pages, bool has_key_scales,
                            bool has_value_scales) {
  const bool quantised = check_presence("key_scales", has_key_scales, key_pages);
  check_presence("value_scales", has_value_scales, key_pages);
  WINNOW_CHECK(!quantised || query.scalar_type() != ScalarType::Double,
               "query: expected float32, bfloat16 or float16 over quantised pages, got float64");
  return quantised;
}

// Of one layer's pages.
inline void check_scales(const char* name, const Tensor& scales, const Tensor& pages) {
  check_dtype(name, scales, ScalarType::Float);
  WINNOW_CHECK(
      scales.dim() == 2 && scales.size(0) == pages.size(0) && scales.size(1) == pages.size(1), name,
      ": expected (num_blocks, Hkv) = (", pages.size(0), ", ", pages.size(1),
      ") as in the pages, got ", shape_of(scales));
}

}  // namespace
}  // namespace winnow
