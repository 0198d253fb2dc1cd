"""Arguments that fit together: the resampling operators."""

from __future__ import annotations

from typing import Any

import torch

from fuzz.call import DTYPES, Call


def weights(call: Call, name: str = "log_weights") -> dict[str, Any]:
    return {name: call.floats(call.size(3), call.size(3), call.size(20))}


def conditional_effective_sample_size(call: Call) -> dict[str, Any]:
    arguments = weights(call)
    return arguments | {"log_increments": torch.randn_like(arguments["log_weights"])}


def next_temperature(call: Call) -> dict[str, Any]:
    arguments = weights(call, "log_likelihood")
    values = arguments["log_likelihood"]
    return arguments | {
        "beta": torch.rand(values.shape[:-1], dtype=call.statistics),
        "target_ess": 0.5,
        "max_beta": 1.0,
        "log_weights": call.maybe(lambda: torch.randn_like(values)),
    }


def resample(call: Call) -> dict[str, Any]:
    arguments = weights(call)
    values = arguments["log_weights"]
    *leading, particles = values.shape
    scheme = call.pick(
        ("systematic", "stratified", "multinomial", "residual", "ssp", "killing", "optimal")
    )
    drawn = {"systematic": leading, "stratified": values.shape, "multinomial": values.shape}
    return arguments | {
        "scheme": scheme,
        "num_samples": call.pick((None, particles, particles + 3)),
        "ess_threshold": call.pick((None, 0.5)),
        "keep_slots": call.pick((True, False)),
        "mask": call.maybe(lambda: call.bools(*values.shape)),
        "uniforms": call.maybe(lambda: torch.rand(drawn[scheme])) if scheme in drawn else None,
        "pinned": call.maybe(lambda: call.indices(*leading, below=particles)),
        "seed": 7,
        "seed_tensor": call.maybe(call.seed),
    }


def sample_without_replacement(call: Call) -> dict[str, Any]:
    arguments = weights(call)
    return arguments | {
        "k": call.size(arguments["log_weights"].shape[-1]),
        "design": call.pick(("gumbel_topk", "conditional_poisson", "pareto")),
        "seed": 7,
        "seed_tensor": call.maybe(call.seed),
    }


def inclusion_probabilities(call: Call) -> dict[str, Any]:
    arguments = weights(call)
    return arguments | {"k": call.size(arguments["log_weights"].shape[-1])}


def trace_ancestors(call: Call) -> dict[str, Any]:
    steps, rows, particles = call.size(3), call.size(3), call.size(6)
    return {
        "ancestors": call.indices(steps, rows, particles, below=particles),
        "indices": call.indices(rows, call.size(3), below=particles),
    }


def uniforms(call: Call) -> dict[str, Any]:
    return {"seed": call.seed(), "rows": call.size(5), "count": call.size(5)}


def gather_particles(call: Call) -> dict[str, Any]:
    rows, particles = call.size(3), call.size(6)
    return {
        "state": call.floats(rows, particles, call.size(3), dtype=call.pick(DTYPES)),
        "ancestors": call.indices(rows, particles, below=particles),
        "dim": call.pick((1, -2)),
    }


effective_sample_size = log_mean_exp = weight_entropy = weights
gather_particles_ = gather_particles
