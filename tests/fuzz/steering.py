"""Arguments that fit together: what resampling has beside its operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fuzz import resampling as operators
from fuzz.call import Call
from torch_winnow import resampling


def fk_potential(call: Call) -> dict[str, Any]:
    reward = operators.weights(call)["log_weights"]
    earlier = None
    if call.pick((True, False)):
        earlier = resampling.fk_potential(reward, None, kind="max", lmbda=1.0)[1]
    kind = call.pick(("difference", "max", "sum"))
    terminal = call.pick((True, False))
    return {"reward": reward, "state": earlier, "kind": kind, "lmbda": 2.0, "terminal": terminal}


def fk_steering(call: Call) -> dict[str, Any]:
    return {
        "kind": call.pick(("difference", "max", "sum")),
        "lmbda": 2.0,
        "ess_threshold": call.pick((None, 0.5, 1.0)),
        "scheme": call.pick(("systematic", "ssp")),
        "seed": call.seed(),
    }


def fk_step(call: Call) -> dict[str, Any]:
    steering = resampling.FKSteering(seed=1)
    reward = operators.weights(call)["log_weights"]
    if call.pick((True, False)):
        steering.step(reward)
    return {"self": steering, "reward": reward, "terminal": call.pick((True, False))}


def fk_select(call: Call) -> dict[str, Any]:
    arguments = fk_step(call)
    reward = arguments.pop("reward")
    del arguments["terminal"]
    arguments["self"].step(reward)
    return arguments | {"tree": {"states": torch.randn(*reward.shape, 2)}}


def genealogy(call: Call) -> dict[str, Any]:
    ancestors = operators.trace_ancestors(call)["ancestors"]
    history = resampling.Genealogy()
    for step in ancestors:
        history.append(step)
    return {"self": history, "ancestors": torch.zeros(ancestors.shape[1:], dtype=torch.int64)}


def traced(call: Call) -> dict[str, Any]:
    arguments = genealogy(call)
    shape = arguments.pop("ancestors").shape
    return arguments | {"indices": call.indices(shape[0], 2, below=shape[1])}


def backward_sample(call: Call) -> dict[str, Any]:
    steps, particles = call.size(3) + 1, call.size(4) + 1
    weights = torch.randn(steps, particles)
    return {
        "log_weights": weights[0],
        "log_transition": lambda particle, successor: -0.1 * (particle - successor).abs().float(),
        "successors": call.indices(3, below=particles),
        "log_bound": call.pick((None, 0.0)),
        "max_tries": call.size(3),
        "seed": call.seed(),
    }


FUNCTIONS: dict[str, tuple[Callable[..., Any], Callable[[Call], dict[str, Any]]]] = {
    "fk_potential": (resampling.fk_potential, fk_potential),
    "normalised_weights": (resampling.normalised_weights, operators.weights),
    "backward_sample": (resampling.backward_sample, backward_sample),
    "FKSteering": (resampling.FKSteering, fk_steering),
    "FKSteering.step": (resampling.FKSteering.step, fk_step),
    "FKSteering.select": (resampling.FKSteering.select, fk_select),
    "Genealogy.append": (resampling.Genealogy.append, genealogy),
    "Genealogy.trace": (resampling.Genealogy.trace, traced),
}
