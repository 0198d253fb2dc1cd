// winnow::block_diagonal_attention on the CPU.
#include "attention/block_diagonal_attention.h"

#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY_IMPL(winnow, CPU, m) {
  m.impl("block_diagonal_attention", TORCH_BOX(&winnow::block_diagonal_attention));
  m.impl("block_diagonal_attention_backward",
         TORCH_BOX(&winnow::block_diagonal_attention_backward));
}
