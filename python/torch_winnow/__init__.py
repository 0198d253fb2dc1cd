"""Kernels that keep only what matters, for inference in PyTorch.

Four families, each a module of its own:

- :mod:`torch_winnow.attention`: chunked compress-and-attend attention.
- :mod:`torch_winnow.resampling`: particles, for steering and sequential Monte Carlo.
- :mod:`torch_winnow.unmasking`: parallel decoding of masked diffusion models.
- :mod:`torch_winnow.kvcache`: block-sparse paged key/value caches.

:mod:`torch_winnow.reference` defines every operator in plain PyTorch.
"""

from torch_winnow._library import BuildInfo, build_info  # isort: skip  (loads the operators first)
from torch_winnow import attention, kvcache, reference, resampling, unmasking

__all__ = [
    "BuildInfo",
    "attention",
    "build_info",
    "kvcache",
    "reference",
    "resampling",
    "unmasking",
]
__version__ = build_info().version
