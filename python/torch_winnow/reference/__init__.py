"""The definition of every operator: one plain-PyTorch function each, same name and signature.

No cleverness and no speed: tests hold the kernels to these functions, benchmarks compare with them.
"""

from torch_winnow.reference.resampling import effective_sample_size
from torch_winnow.reference.unmasking import (
    generate,
    logit_stats,
    select_positions,
    unmask_step_,
)

__all__ = [
    "effective_sample_size",
    "generate",
    "logit_stats",
    "select_positions",
    "unmask_step_",
]
