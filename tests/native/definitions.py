"""The definitions for tensors on any device: they make masks and indices on the CPU."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from torch_winnow import reference


def on_the_cpu(
    definition: Callable[..., Any], move: Callable[[Tensor], Tensor] = Tensor.cpu
) -> Callable[..., Any]:
    """The definition, evaluated on the CPU; results lie where the first tensor does."""

    @functools.wraps(definition)
    def call(*args: Any, **options: Any) -> Any:
        leaves, spec = pytree.tree_flatten((args, options))
        moved = [move(x) if isinstance(x, Tensor) else x for x in leaves]
        moved_args, moved_options = pytree.tree_unflatten(moved, spec)
        result = definition(*moved_args, **moved_options)
        if definition.__name__.endswith("_"):  # in place: its first argument is written
            for ours, theirs in zip(
                pytree.tree_leaves(args[0]), pytree.tree_leaves(moved_args[0]), strict=True
            ):
                ours.copy_(theirs)
        device = next((x.device for x in leaves if isinstance(x, Tensor)), torch.device("cpu"))
        return pytree.tree_map_only(Tensor, lambda x: x.to(device), result)

    return call


def use_the_cpu() -> None:
    """From now on, for every definition that is looked up in torch_winnow.reference."""
    for name, definition in list(vars(reference).items()):
        if inspect.isfunction(definition) and not name.startswith("_"):
            setattr(reference, name, on_the_cpu(definition))
