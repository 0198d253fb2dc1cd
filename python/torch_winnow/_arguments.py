"""Checks of arguments, for all families: what came is named, and what is accepted."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor


def integer(name: str, value: Any, lowest: int | None = None) -> int:
    """``value`` as an int that int64 holds: any integer type, numpy's too, but no bool."""
    if type(value) is not int:
        try:
            if isinstance(value, bool):  # an index that is a mask is a mistake
                raise TypeError
            value = operator.index(value)
        except TypeError:
            raise ValueError(f"{name}: expected an integer, got {value!r}") from None
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"{name}: expected a 64-bit signed integer, got {value}")
    if lowest is not None and value < lowest:
        raise ValueError(f"{name}: expected at least {lowest}, got {value}")
    return int(value)


def count_or_none(name: str, value: Any) -> int | None:
    """``value`` as a number of things, at least one, or None."""
    try:
        return None if value is None else integer(name, value, 1)
    except ValueError:
        raise ValueError(f"{name}: expected None or at least 1, got {value!r}") from None


def is_number(value: object) -> bool:
    """Whether ``value`` is a real number, numpy's too; a bool or a tensor is none."""
    return isinstance(value, Real) and not isinstance(value, bool)


def number(name: str, value: Any, lowest: float = -math.inf, highest: float = math.inf) -> float:
    """``value`` as a float: any real number but NaN."""
    if not is_number(value) or not lowest <= value <= highest:  # NaN is nowhere between
        wanted = "a number"
        if highest < math.inf:
            wanted = f"a number in [{lowest:g}, {highest:g}]"
        elif lowest > -math.inf:
            wanted = f"a number >= {lowest:g}"
        raise ValueError(f"{name}: expected {wanted}, got {value!r}")
    return float(value)


def choice(name: str, value: Any, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")


def check_tensors(**values: object) -> None:
    for name, value in values.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"{name}: expected a tensor, got {value!r}")


def check_optional(**values: object) -> None:
    """Tensors or None."""
    for name, value in values.items():
        if value is not None and not isinstance(value, Tensor):
            raise ValueError(f"{name}: expected a tensor or None, got {value!r}")


def check_generator(generator: object, seed: object) -> None:
    """A generator or None, and only one source of randomness."""
    if generator is not None and not isinstance(generator, torch.Generator):
        raise ValueError(f"generator: expected a torch.Generator, got {type(generator).__name__}")
    if generator is not None and seed is not None:
        raise ValueError("seed: expected either a seed or a generator, got both")
