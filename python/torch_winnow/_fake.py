"""How fake kernels are registered, and what all of them check."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from torch_winnow import _library

Fake = TypeVar("Fake", bound=Callable[..., object])


def _refuse_cuda(name: str, *args: object, **kwargs: object) -> None:
    """What is said of tensors on a GPU, in place of the dispatcher's list of backends."""
    raise RuntimeError(
        f"{name}: expected tensors on the CPU, got some on a GPU, and the CUDA operators of "
        f"torch-winnow are not loaded ({_library.cuda_reason}); install a wheel for this CUDA, or "
        "build from source where nvcc is (`python -m torch_winnow` tells what is installed)"
    )


def register_fake(name: str) -> Callable[[Fake], Fake]:
    """``torch.library.register_fake`` for an operator of ours, from one file for all.

    It looks up the module it is called from, once per file among all modules that Python has
    loaded. With the calls spread over the families, this was half of the time to import.
    """

    def register(fake: Fake) -> Fake:
        torch.library.register_fake(f"winnow::{name}", fake)
        if torch.version.cuda is not None and _library.cuda_reason:
            torch.library.impl(f"winnow::{name}", "cuda", functools.partial(_refuse_cuda, name))
        return fake

    return register


def check_same_device(**tensors: Tensor | None) -> None:
    """Refuses tensors on different devices; the first one says which is expected.

    A single meta tensor makes the dispatcher pick the fake kernel. Beside tensors with data, its
    result would be memory that nothing fills. A number on the CPU, a seed say, goes with any
    device, as everywhere in PyTorch.
    """
    first, expected = None, None
    for argument, tensor in tensors.items():
        if tensor is None or (tensor.dim() == 0 and tensor.device.type == "cpu"):
            continue
        if expected is None:
            first, expected = argument, tensor.device
        elif tensor.device != expected:
            raise ValueError(
                f"{argument}: expected a tensor on {expected} like {first}, got one on "
                f"{tensor.device}"
            )
