// Where new tokens go, for the kernels that store them. Positions and blocks stay on the device and
// are not checked: what lies outside of the pages stores nothing.
#pragma once

#include "common/device.h"

namespace winnow {
namespace {

struct Positions {
  Global<const int32_t> block_table;
  int64_t table_stride;
  int64_t table_width;
  Global<const int64_t> positions;
  int64_t positions_stride;
  int64_t num_blocks;
  int64_t block_size;
  int64_t heads;
  int64_t tokens;
  int64_t items;  // tokens of all rows and heads

  // -1 where there is none.
  WINNOW_DEVICE int64_t at(int64_t row, int64_t token) const {
    const int64_t position = positions[row * positions_stride + token];
    return position < 0 || position >= table_width * block_size ? -1 : position;
  }
};

Positions positions_of(const Tensor& key, const Tensor& key_pages, const Tensor& block_table,
                       const Tensor& positions) {
  return {global<const int32_t>(block_table),
          block_table.stride(0),
          block_table.size(1),
          global<const int64_t>(positions),
          positions.stride(0),
          key_pages.size(0),
          key_pages.size(2),
          key.size(1),
          key.size(2),
          key.size(0) * key.size(1) * key.size(2)};
}

}  // namespace
}  // namespace winnow
