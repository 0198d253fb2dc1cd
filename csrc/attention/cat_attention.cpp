// winnow::cat_attention on the CPU.
#include "attention/cat_attention.h"

#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY_IMPL(winnow, CPU, m) {
  m.impl("cat_attention", TORCH_BOX(&winnow::cat_attention));
  m.impl("cat_attention_backward", TORCH_BOX(&winnow::cat_attention_backward));
}
