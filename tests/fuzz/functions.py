"""Calls of the public functions, classes and methods with arguments that were spoiled."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fuzz import cache_methods, decoding, steering
from fuzz.call import Call
from fuzz.operators import ARGUMENTS, check_refusal
from fuzz.spoiling import estranged, mapped, tensors_of
from torch_winnow import attention, kvcache, resampling, unmasking

Maker = Callable[[Call], dict[str, Any]]


def of_operator(function: Callable[..., Any], make: Maker) -> Maker:
    """The arguments of an operator as those of the function around it."""
    accepted = inspect.signature(function).parameters

    def adapted(call: Call) -> dict[str, Any]:
        arguments = make(call)
        if arguments.pop("raw", False):
            arguments["statistics"] = "raw"
        if "rule" in accepted:
            arguments["rule"] = decoding.rule(call)
            for name in ("order", "criterion", "threshold", "limit", "order_seed"):
                arguments.pop(name, None)
            if "logits" in arguments:
                del arguments["score"]
        if "tree" in accepted:
            arguments["tree"] = [arguments.pop("state")]
        if "kind" in accepted:
            arguments["kind"] = "minmax" if arguments.pop("minmax") else "mean"
        if "options" in str(accepted):
            return arguments
        return {name: value for name, value in arguments.items() if name in accepted}

    return adapted


FUNCTIONS: dict[str, tuple[Callable[..., Any], Maker]] = {
    name: (getattr(family, name), of_operator(getattr(family, name), ARGUMENTS[name]))
    for family in (attention, resampling, unmasking, kvcache)
    for name in family.__all__
    if name in ARGUMENTS and name != "merge_logit_stats"
}
FUNCTIONS |= steering.FUNCTIONS | decoding.FUNCTIONS | cache_methods.FUNCTIONS


def spoiled_arguments(name: str, call: Call) -> dict[str, Any]:
    arguments = FUNCTIONS[name][1](call)
    for _ in range(call.pick((0, 1, 1, 2))):
        which = call.pick([key for key in sorted(arguments) if key != "self"])
        arguments[which] = estranged(call, arguments[which])
    return arguments


def try_function(name: str, choose: Callable[[int], int]) -> None:
    """One call; raises AssertionError, with the arguments, where it is not as it should be.

    A call that is refused has written to no argument, and not changed the object it was made on.
    """
    function = FUNCTIONS[name][0]
    arguments = spoiled_arguments(name, Call(choose))
    given = str(arguments)
    before = mapped(list(arguments.values()), torch.clone)
    state = cache_methods.state_of(arguments.get("self"))
    try:
        try:
            function(**arguments)
        except Exception as error:
            names = {*arguments, *parameters_of(function), *name.split(".")}
            for method in vars(type(arguments.get("self"))).values():
                names |= parameters_of(method)  # an earlier call may have decided
            if "meta" in str(error) and any(map(tensors_on_meta, arguments.values())):
                return  # torch misses the numbers, and says so
            check_refusal(error, names - {"self"})
            for old, new in zip(before, arguments.values(), strict=True):
                assert all(map(same, tensors_of(old), tensors_of(new))), "written to"
            assert cache_methods.state_of(arguments.get("self")) == state, "changed"
    except Exception as error:
        raise AssertionError(f"{name}({given})") from error


def parameters_of(function: Any) -> set[str]:
    return set(inspect.signature(function).parameters) if inspect.isfunction(function) else set()


def tensors_on_meta(value: Any) -> bool:
    return any(tensor.is_meta for tensor in tensors_of(value))


def same(left: Tensor, right: Tensor) -> bool:
    return left.is_meta or torch.equal(left.nan_to_num(0.1), right.nan_to_num(0.1))
