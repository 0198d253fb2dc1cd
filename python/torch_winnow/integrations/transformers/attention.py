"""Attention ``"winnow"``: over pages where a ``WinnowCache`` holds the keys, dense elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.masking_utils import causal_mask_function, sdpa_mask

from torch_winnow._slow_path import warn_slow
from torch_winnow.integrations.transformers.cache import Columns
from torch_winnow.integrations.transformers.dense import (
    block_mask,
    block_size_of,
    dense_attention,
    logical_blocks,
)
from torch_winnow.integrations.transformers.view import PagedStates
from torch_winnow.kvcache import paged_attention


class PagedMask:
    """What a query may see of a ``WinnowCache``: handed to the layers in place of a tensor.

    A model that computes with its mask fails on this instead of going wrong.
    """

    def __init__(self, window: int | None, pages_tell: bool, arguments: dict[str, Any]) -> None:
        self.window = window
        self.pages_tell = pages_tell  # causality, the window and the stored tokens say it all
        self._arguments = arguments

    @cached_property
    def dense(self) -> Tensor:
        """``(B, 1, T, N)`` bool."""
        options = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
        mask: Tensor = sdpa_mask(**(self._arguments | options))
        return mask


def paged_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    config: Any = None,
    **options: Any,
) -> Tensor | PagedMask | None:
    """The mask of attention ``"winnow"``: SDPA's, unless a ``WinnowCache`` is to be attended."""
    arguments = options | {
        "batch_size": batch_size,
        "q_length": q_length,
        "kv_length": kv_length,
        "q_offset": q_offset,
        "kv_offset": kv_offset,
        "mask_function": mask_function,
        "attention_mask": attention_mask,
        "local_size": local_size,
        "allow_is_causal_skip": allow_is_causal_skip,
        "config": config,
    }
    if not isinstance(kv_length, Columns):
        mask: Tensor | None = sdpa_mask(**arguments)
        return mask
    if attention_mask is not None:
        # Shorter ones hide what they do not reach, as in transformers.
        attention_mask = F.pad(attention_mask, (0, kv_length - attention_mask.shape[1]))
    left_padded = kv_length.storage.announce(q_offset, q_length, attention_mask)
    # A window arrives as a function. Where nothing was added to it, it may be skipped in favour of
    # causality; of what has a local size, only chunks are no window.
    is_window = (
        local_size is not None
        and allow_is_causal_skip
        and local_size == getattr(config, "sliding_window", None)
        and getattr(config, "attention_chunk_size", None) is None
    )
    known = mask_function is causal_mask_function or is_window
    return PagedMask(local_size if is_window else None, known and left_padded, arguments)


def winnow_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | PagedMask | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    block_indices: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of a transformers layer, ``(B, T, Hq, Dv)``; registered as ``"winnow"``."""
    if kwargs.get("output_attentions"):
        raise ValueError(
            "output_attentions: attention 'winnow' computes no attention weights; use "
            "model.set_attn_implementation('eager')"
        )
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    if isinstance(key, PagedStates) and isinstance(value, PagedStates):
        key.check()
        blocks = None
        if block_indices is not None and key.source.dropped is None:
            size, page = block_size_of(module, kwargs), key.source.block_size
            blocks = logical_blocks(block_indices, size, page, key.shape[1])
        if (
            (attention_mask is None or _pages_tell(attention_mask))
            and (block_indices is None or blocks is not None)
            and softcap is None
            and kwargs.get("position_bias") is None
            and not dropout
        ):
            window = getattr(attention_mask, "window", None)
            causal = attention_mask is not None or is_causal
            return _attend(query, key, blocks, window, causal, scaling, s_aux), None
        reasons = {
            "a softcap of the scores": softcap is not None,
            "a position bias": kwargs.get("position_bias") is not None,
            "dropout": dropout > 0,
            "these block_indices": block_indices is not None and blocks is None,
        }
        reason = next((text for text, found in reasons.items() if found), "this attention mask")
        warn_slow(
            f"pages and {reason}",
            f"attention 'winnow': paged attention does not know {reason}, so every layer copies "
            "its keys and values out of the pages at every step. DynamicCache is faster here; "
            "pages know causal masks, sliding windows and padding at the left",
        )
        mask = _dense_mask(query, key, attention_mask, is_causal)
        key, value = (x.source.gather(x.layer, x.part) for x in (key, value))
    else:
        # A model that made new keys of those in the pages.
        mask = attention_mask.dense if isinstance(attention_mask, PagedMask) else attention_mask
    if block_indices is not None:
        mask = block_mask(block_indices, block_size_of(module, kwargs), query, key, mask, is_causal)
    out = dense_attention(
        module, query, key, value, mask, dropout, scaling, is_causal, softcap, s_aux, **kwargs
    )
    return out, None


def _pages_tell(mask: Tensor | PagedMask) -> bool:
    return isinstance(mask, PagedMask) and mask.pages_tell


def _attend(
    query: Tensor,
    key: PagedStates,
    blocks: Tensor | None,
    window: int | None,
    causal: bool,
    scaling: float | None,
    s_aux: Tensor | None,
) -> Tensor:
    """Over the pages of the layer of ``key``; ``blocks`` are ``(B, Hkv, T, K)`` of the model's."""
    storage, layer = key.source, key.layer
    cache, (key_pages, value_pages) = storage.pages, storage.pool._layers[layer]
    key_scales, value_scales = storage.pool._scales[layer] or (None, None)
    table, lengths = cache.block_table, cache.seq_lens
    batch, heads, tokens, dim = query.shape
    chosen = None
    if blocks is not None:
        # Each query has blocks of its own: it becomes a row.
        table = table.repeat_interleave(tokens, 0)
        behind = torch.arange(1 - tokens, 1, dtype=torch.int32, device=query.device)
        lengths = (lengths[:, None] + behind).flatten()
        query = query.transpose(1, 2).reshape(batch * tokens, heads, 1, dim)
        chosen = blocks.transpose(1, 2).flatten(0, 1)
        ahead = chosen * storage.block_size >= lengths[:, None, None]
        chosen = chosen.masked_fill(ahead, -1).sort(-1).values.int()
    elif storage.sparse is not None and tokens == 1 and window is None:
        chosen = storage.sparse.select(query, cache, layer)
    out, lse = paged_attention(
        query,
        key_pages,
        value_pages,
        table,
        lengths,
        causal=causal,
        block_indices=chosen,
        window=window,
        scale=scaling,
        key_scales=key_scales,
        value_scales=value_scales,
        return_lse=True,
    )
    if s_aux is not None:
        # A sink takes its share of the softmax and gives no value.
        share = torch.sigmoid(lse - s_aux[:, None].to(lse.dtype))
        out = (out * share[..., None]).to(query.dtype)
    return out.transpose(1, 2).reshape(batch, tokens, heads, -1)


def _dense_mask(
    query: Tensor, key: PagedStates, mask: Tensor | PagedMask | None, is_causal: bool
) -> Tensor | None:
    """The mask as a tensor; where padding was not stored, it must be hidden."""
    columns, tokens = key.shape[2], query.shape[2]
    if isinstance(mask, PagedMask):
        return mask.dense
    if mask is None:
        position = torch.arange(columns, device=query.device)
        seen = position <= position[columns - tokens :, None]
        mask = seen if is_causal else torch.ones_like(seen)
        mask = mask.expand(len(query), 1, -1, -1)
    if key.source.dropped is not None:
        hidden = ~mask if mask.dtype == torch.bool else mask < -1e4
        # Queries that are padding themselves may look anywhere.
        dropped = torch.tensor(key.source.dropped, device=query.device)
        last = torch.arange(columns - tokens, columns, device=query.device)
        real = dropped[:, None] <= last
        key.source.check_hidden((hidden.all(1) | ~real[..., None]).all(1))
    return mask
