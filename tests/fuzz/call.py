"""The arguments of one call, out of a sequence of choices.

Whoever makes the choices decides what is looked at next: hypothesis in the test suite, the bytes
of a coverage-guided fuzzer in ``make fuzz``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

FLOATING = (torch.float32, torch.float32, torch.bfloat16, torch.float16, torch.float64)
DTYPES = (*FLOATING, torch.int32, torch.int64, torch.int8, torch.bool, torch.complex64)
# None of these is a size that can be allocated and takes long to fill.
INTEGERS = (-(2**63), -(2**31) - 1, -2, -1, 0, 1, 2, 3, 5, 64, 2**62, 2**63 - 1)
NUMBERS = (-1e300, -1.0, -0.0, 0.0, 1e-300, 0.3, 1.0, 7.0, 1e300, float("inf"), float("nan"))


class Call:
    """Makes arguments; ``choose(n)`` gives a number from 0 to n - 1."""

    def __init__(self, choose: Callable[[int], int]) -> None:
        self.choose = choose
        torch.manual_seed(choose(100))
        self.dtype = self.pick(FLOATING)
        self.statistics = torch.float64 if self.dtype == torch.float64 else torch.float32

    def pick(self, choices: Sequence[Any]) -> Any:
        return choices[self.choose(len(choices))]

    def size(self, most: int = 4) -> int:
        return self.choose(most + 1)

    def maybe(self, make: Callable[[], Any]) -> Any:
        return make() if self.pick((True, False)) else None

    def floats(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(shape).to(dtype or self.dtype)

    def indices(self, *shape: int, below: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.randint(0, max(below, 1), shape, dtype=dtype)

    def bools(self, *shape: int) -> Tensor:
        return torch.rand(shape) < 0.7

    def seed(self) -> Tensor:
        return torch.tensor(self.pick(INTEGERS))
