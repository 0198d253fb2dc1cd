#pragma once

#include <cstdint>

#include "common/cpu_capability.h"
#include "kvcache/paged_attention_simd.h"

namespace winnow {

// A call of attention_mass: the queries, keys and mask of an attention without values, and the lse
// of its rows. Strides in elements.
struct AttentionMass {
  PagedAttention attention;
  const void* lse;         // float, or double for double, as is the bias
  int64_t lse_stride[3];   // batch, head, position
  const void* key_bias;    // or null
  int64_t bias_stride[3];  // block, head, slot
  void* mass;              // (B, Hkv, entries * block_size)
  int64_t entries;         // columns of the block table
};

// Floats of scratch memory that a task needs; of doubles for double.
WINNOW_SIMD_DECLARE(attention_mass_scratch, const AttentionMass& call, int64_t* floats)

// What the keys in the columns [begin, end) of the table receive from all rows of a key head.
WINNOW_SIMD_DECLARE(attention_mass_task, const AttentionMass& call, int64_t batch, int64_t key_head,
                    int64_t begin, int64_t end, void* scratch)

}  // namespace winnow
