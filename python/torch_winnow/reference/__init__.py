"""The definition of every operator: one plain-PyTorch function each, same name and signature.

No cleverness and no speed: tests hold the kernels to these functions, benchmarks compare with them.
"""

from torch_winnow.reference.attention import (
    block_diagonal_attention,
    cat_attention,
    chunk_attention,
    merge_attention,
)
from torch_winnow.reference.kvcache import (
    attention_mass,
    block_summaries,
    compact_pages_,
    paged_attention,
    score_blocks,
    score_select_blocks,
    select_blocks,
    update_block_summaries_,
)
from torch_winnow.reference.logit_stats import (
    linear_logit_stats,
    logit_stats,
    merge_logit_stats,
)
from torch_winnow.reference.resampling import (
    effective_sample_size,
    gather_particles,
    gather_particles_,
    resample,
)
from torch_winnow.reference.resampling_genealogy import backward_sample, trace_ancestors
from torch_winnow.reference.resampling_weights import (
    conditional_effective_sample_size,
    log_mean_exp,
    next_temperature,
    normalised_weights,
    weight_entropy,
)
from torch_winnow.reference.resampling_without_replacement import (
    inclusion_probabilities,
    sample_without_replacement,
)
from torch_winnow.reference.soft_embedding import soft_embedding
from torch_winnow.reference.steering import FKSteering, fk_potential
from torch_winnow.reference.unmasking import generate, select_positions, unmask_step_
from torch_winnow.reference.verification import speculative_verify

__all__ = [
    "FKSteering",
    "attention_mass",
    "backward_sample",
    "block_diagonal_attention",
    "block_summaries",
    "cat_attention",
    "chunk_attention",
    "compact_pages_",
    "conditional_effective_sample_size",
    "effective_sample_size",
    "fk_potential",
    "gather_particles",
    "gather_particles_",
    "generate",
    "inclusion_probabilities",
    "linear_logit_stats",
    "log_mean_exp",
    "logit_stats",
    "merge_attention",
    "merge_logit_stats",
    "next_temperature",
    "normalised_weights",
    "paged_attention",
    "resample",
    "sample_without_replacement",
    "score_blocks",
    "score_select_blocks",
    "select_blocks",
    "select_positions",
    "soft_embedding",
    "speculative_verify",
    "trace_ancestors",
    "unmask_step_",
    "update_block_summaries_",
    "weight_entropy",
]
