"""The definition of every operator: one plain-PyTorch function each, same name and signature.

No cleverness and no speed: tests hold the kernels to these functions, benchmarks compare with them.
"""

from torch_winnow.reference.kvcache import (
    block_summaries,
    paged_attention,
    score_blocks,
    select_blocks,
)
from torch_winnow.reference.resampling import (
    effective_sample_size,
    fk_potential,
    gather_particles,
    gather_particles_,
    resample,
)

__all__ = [
    "block_summaries",
    "effective_sample_size",
    "fk_potential",
    "gather_particles",
    "gather_particles_",
    "paged_attention",
    "resample",
    "score_blocks",
    "select_blocks",
]
