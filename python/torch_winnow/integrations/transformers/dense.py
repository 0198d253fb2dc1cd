"""Attention over dense keys, where pages do not serve: softcaps, masks that are no left padding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward


def dense_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    scaling: float | None,
    is_causal: bool,
    softcap: float | None,
    s_aux: Tensor | None,
    **kwargs: Any,
) -> Tensor:
    """SDPA, or in its own words what SDPA lacks: a softcap of the scores, attention sinks.

    ``mask``: ``(B, 1 or Hq, T, N)`` bool or added to the scores; None with ``is_causal`` for
    queries that begin with the first key. Differentiable. Returns ``(B, T, Hq, Dv)``.
    """
    if softcap is None and s_aux is None:
        out: Tensor = sdpa_attention_forward(
            module, query, key, value, mask, dropout, scaling, is_causal, **kwargs
        )[0]
        return out
    if kwargs.get("position_bias") is not None:
        raise ValueError(
            "position_bias: expected None together with a softcap or sinks, got a bias"
        )
    tokens, columns = query.shape[2], key.shape[2]
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is None and is_causal and tokens > 1:
        mask = torch.ones(tokens, columns, dtype=torch.bool, device=query.device).tril()
    if mask is not None:
        # The lowest number instead of -inf: padding sees nothing, and must not become NaN.
        lowest = torch.finfo(scores.dtype).min
        scores = torch.where(mask, scores, lowest) if mask.dtype == torch.bool else scores + mask
    if s_aux is not None:
        sinks = s_aux.to(scores.dtype).view(1, -1, 1, 1).expand(len(scores), -1, tokens, 1)
        scores = torch.cat([scores, sinks], -1)
    weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)[..., :columns]
    weights = torch.nn.functional.dropout(weights, dropout, module.training)
    return (weights @ value).transpose(1, 2).contiguous()


def block_size_of(module: torch.nn.Module, options: dict[str, Any]) -> int:
    """The block size in which a model names its ``block_indices``."""
    size = options.get("block_size") or getattr(
        getattr(module, "indexer", None), "block_size", None
    )
    if size is None:
        raise ValueError(
            "block_indices: the size of their blocks is not known; pass block_size along with them "
            "to the attention function, or set module.indexer.block_size"
        )
    return int(size)


def logical_blocks(blocks: Tensor, size: int, page: int, key_heads: int) -> Tensor | None:
    """A model's blocks of ``size`` tokens ``(B, 1 or Hkv, T, K)`` as blocks of ``page`` tokens.

    None where pages cannot say it.
    """
    if blocks.dim() != 4 or blocks.shape[1] not in (1, key_heads) or size % page != 0:
        return None
    parts = size // page
    split = blocks[..., None] * parts + torch.arange(parts, device=blocks.device)
    return split.masked_fill(blocks[..., None] < 0, -1).flatten(-2).expand(-1, key_heads, -1, -1)


def block_mask(
    blocks: Tensor, size: int, query: Tensor, key: Tensor, mask: Tensor | None, is_causal: bool
) -> Tensor:
    """``mask`` without the keys outside ``blocks`` ``(B, H, T, K)``, as ``(B, Hq, T, N)``."""
    heads, tokens, columns = query.shape[1], query.shape[2], key.shape[2]
    if blocks.dim() != 4 or heads % blocks.shape[1] != 0 or blocks.shape[2] != tokens:
        raise ValueError(
            f"block_indices: expected (B, H, T, K) with H dividing {heads} and T={tokens}, got "
            f"{tuple(blocks.shape)}"
        )
    count = -(-columns // size)
    # A block of -1 marks the one behind the last, which is cut off.
    chosen = torch.zeros(*blocks.shape[:3], count + 1, dtype=torch.bool, device=key.device)
    chosen.scatter_(-1, blocks.long().masked_fill(blocks < 0, count), True)
    seen = chosen[..., :count].repeat_interleave(size, -1)[..., :columns]
    seen = seen.repeat_interleave(heads // blocks.shape[1], 1)
    if mask is not None and mask.dtype != torch.bool:
        return torch.where(seen, mask, torch.finfo(mask.dtype).min)
    if mask is not None:
        return seen & mask
    if is_causal and tokens > 1:
        seen &= torch.ones(tokens, columns, dtype=torch.bool, device=key.device).tril()
    return seen
