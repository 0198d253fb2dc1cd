"""Definitions of the operators over paged caches."""

from __future__ import annotations

import torch
from torch import Tensor


def paged_attention(
    query: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    *,
    causal: bool = True,
    block_indices: Tensor | None = None,
    window: int | None = None,
    sinks: int = 0,
    key_bias: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention of each query head over the keys that its query may see."""
    batch, heads, queries, dim = query.shape
    blocks, key_heads, block_size, _ = key_pages.shape
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    scale = dim**-0.5 if scale is None else scale
    out = query.new_zeros(batch, heads, queries, value_pages.shape[-1])
    lse = torch.full((batch, heads, queries), -torch.inf, dtype=wide, device=query.device)
    if key_bias is not None:
        key_bias = key_bias.to(wide).expand(blocks, key_heads, block_size)
    for b in range(batch):
        length = int(seq_lens[b])
        j = torch.arange(length, device=query.device)
        block, slot = block_table[b].long()[j // block_size], j % block_size
        for head in range(heads):
            h = head // (heads // key_heads)
            chosen = torch.ones(length, dtype=torch.bool, device=query.device)
            if block_indices is not None:
                named = block_indices[b] if block_indices.dim() == 2 else block_indices[b, h]
                chosen = torch.isin(j // block_size, named)
            key = key_pages[block, h, slot].to(wide)
            value = value_pages[block, h, slot].to(wide)
            for t in range(queries):
                i = length - queries + t
                seen = chosen & (j <= i) if causal else chosen.clone()
                if window is not None:
                    near = (i - j < window) if causal else ((i - j).abs() < window)
                    seen &= near | (j < sinks)
                score = key[seen] @ query[b, head, t].to(wide) * scale
                if key_bias is not None:
                    score = score + key_bias[block, h, slot][seen]
                visible = score != -torch.inf
                score = score[visible]
                if score.numel() > 0:
                    out[b, head, t] = (score.softmax(0) @ value[seen][visible]).to(out.dtype)
                    lse[b, head, t] = score.logsumexp(0)
    return (out, lse) if return_lse else out
