"""Kernels that keep only what matters, for inference in PyTorch.

Four families, each a module of its own:

- :mod:`torch_winnow.attention`: chunked compress-and-attend attention.
- :mod:`torch_winnow.resampling`: particles, for steering and sequential Monte Carlo.
- :mod:`torch_winnow.unmasking`: parallel decoding of masked diffusion models.
- :mod:`torch_winnow.kvcache`: block-sparse paged key/value caches.

:mod:`torch_winnow.reference` defines every operator in plain PyTorch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch_winnow._library import BuildInfo, build_info  # isort: skip  (loads the operators first)
from torch_winnow import attention, kvcache, resampling, unmasking
from torch_winnow._slow_path import SlowPathWarning

if TYPE_CHECKING:
    from types import ModuleType

    from torch_winnow import reference

__all__ = [
    "BuildInfo",
    "SlowPathWarning",
    "attention",
    "build_info",
    "kvcache",
    "reference",
    "resampling",
    "unmasking",
]
__version__ = build_info().version


def __getattr__(name: str) -> ModuleType:
    """The definitions are imported when they are asked for: a model at work needs none."""
    if name == "reference":
        import importlib

        return importlib.import_module("torch_winnow.reference")
    raise AttributeError(f"module 'torch_winnow' has no attribute {name!r}")
