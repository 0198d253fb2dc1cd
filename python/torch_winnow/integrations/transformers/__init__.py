"""Paged caches for Hugging Face transformers: attention ``"winnow"`` and :class:`WinnowCache`.

:func:`register` makes the attention implementation known. With it, a model reads keys and values
from the pages of a :class:`WinnowCache` where they lie: beams and particles share blocks, left
padding is not stored, and :class:`BlockSparse` decodes over chosen blocks only. Without that cache
(training, ``DynamicCache``, ``StaticCache``) ``"winnow"`` is SDPA, with the softcap or the
attention sinks that a model asks for, and a ``WinnowCache`` under another implementation is read as
dense tensors. Either way the result is the model's own.

Example:
    >>> import torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from torch_winnow.integrations.transformers import WinnowCache, register
    >>> register()
    >>> config = LlamaConfig(
    ...     vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
    ...     num_attention_heads=4, num_key_value_heads=2,
    ... )
    >>> model = LlamaForCausalLM(config).eval()
    >>> prompt = torch.tensor([[1, 5, 7]])
    >>> expected = model.generate(prompt, max_new_tokens=5, do_sample=False)
    >>> model.set_attn_implementation("winnow")
    >>> tokens = model.generate(
    ...     prompt, max_new_tokens=5, do_sample=False, past_key_values=WinnowCache(model.config)
    ... )
    >>> bool((tokens == expected).all())
    True
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import transformers
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask


def _require(mask_function: Callable[..., Any]) -> None:
    # Transformers 4 hands caches and masks the positions of the queries instead of their number.
    if "q_length" not in inspect.signature(mask_function).parameters:
        raise ImportError(
            "torch_winnow.integrations.transformers: needs transformers 5 (tested with 5.18), "
            f"whose masks are built from q_length, got {transformers.__version__}; with an older "
            "one, call torch_winnow.kvcache from the model itself"
        )


_require(sdpa_mask)

from torch_winnow.integrations.transformers.attention import (  # noqa: E402
    paged_mask,
    winnow_attention,
)
from torch_winnow.integrations.transformers.cache import WinnowCache  # noqa: E402
from torch_winnow.integrations.transformers.sparse import BlockSparse  # noqa: E402

__all__ = ["BlockSparse", "WinnowCache", "register"]


def register() -> None:
    """Make ``model.set_attn_implementation("winnow")`` known to transformers; twice is harmless."""
    AttentionInterface.register("winnow", winnow_attention)
    AttentionMaskInterface.register("winnow", paged_mask)
