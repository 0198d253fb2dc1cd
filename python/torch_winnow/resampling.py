"""Particles: weights, resampling, moving and steering.

A weighted population of K particles stands for a distribution. Resampling replaces it by one of
equal weights: particles of large weight are copied, those of small weight disappear. Resample only
when the weights have become uneven (``ess_threshold``), and use ``"systematic"`` unless you have a
reason not to: it adds the least noise. Introductions: Chopin and Papaspiliopoulos, *An introduction
to sequential Monte Carlo* (2020), chapters 8 and 9; Doucet and Johansen (2009).
"""

from torch_winnow._resampling.gather import gather_particles, gather_particles_
from torch_winnow._resampling.genealogy import Genealogy, backward_sample, trace_ancestors
from torch_winnow._resampling.resample import Resampling, Status, resample
from torch_winnow._resampling.steering import FKSteering, PotentialState, fk_potential
from torch_winnow._resampling.tempering import next_temperature
from torch_winnow._resampling.weights import (
    conditional_effective_sample_size,
    effective_sample_size,
    log_mean_exp,
    normalised_weights,
    weight_entropy,
)
from torch_winnow._resampling.without_replacement import (
    WithoutReplacement,
    inclusion_probabilities,
    sample_without_replacement,
)

__all__ = [
    "FKSteering",
    "Genealogy",
    "PotentialState",
    "Resampling",
    "Status",
    "WithoutReplacement",
    "backward_sample",
    "conditional_effective_sample_size",
    "effective_sample_size",
    "fk_potential",
    "gather_particles",
    "gather_particles_",
    "inclusion_probabilities",
    "log_mean_exp",
    "next_temperature",
    "normalised_weights",
    "resample",
    "sample_without_replacement",
    "trace_ancestors",
    "weight_entropy",
]
