"""What a benchmark on the GPU consists of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FULL = DEVICE.type == "cuda"


@dataclass
class Case:
    name: str
    make: Callable[[], tuple]
    ours: Callable[..., Any]
    rivals: dict[str, Callable[..., Any]]
    moved: float  # bytes of memory traffic that the definition needs at least
    check: Callable[..., None]
    operations: float = 0.0  # of the definition, where matrix products are most of it


def scaled(full: int, small: int) -> int:
    return full if FULL else small


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, fullgraph=True, dynamic=False) if FULL else function


def close(ours: Callable[..., Any], definition: Callable[..., Any], tolerance: float):
    def check(*arguments: Any) -> None:
        torch.testing.assert_close(
            ours(*arguments).double(),
            definition(*arguments).double(),
            rtol=tolerance,
            atol=tolerance,
        )

    return check
