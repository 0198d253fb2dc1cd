"""Definitions of the operators over paged caches."""

from __future__ import annotations

import torch
from torch import Tensor


def _sees(i: int, j: Tensor, causal: bool, window: int | None, sinks: int) -> Tensor:
    """Whether a query at position ``i`` sees the keys at positions ``j``."""
    seen = j <= i if causal else torch.ones_like(j, dtype=torch.bool)
    if window is not None:
        seen = seen & (((i - j).abs() < window) | (j < sinks))
    return seen


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
    key_scales: Tensor | None = None,
    value_scales: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention of each query head over the keys that its query may see."""
    batch, heads, queries, dim = query.shape
    blocks, key_heads, block_size, _ = key_pages.shape
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    scale = dim**-0.5 if scale is None else scale
    if key_scales is not None and value_scales is not None:
        key_pages = key_pages.to(wide) * key_scales[..., None, None]
        value_pages = value_pages.to(wide) * value_scales[..., None, None]
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
                seen = chosen & _sees(length - queries + t, j, causal, window, sinks)
                if key_bias is not None:
                    bias = key_bias[block, h, slot]
                    seen &= bias != -torch.inf
                score = key[seen] @ query[b, head, t].to(wide) * scale
                if key_bias is not None:
                    score = score + bias[seen]
                visible = score != -torch.inf
                score = score[visible]
                if score.numel() > 0:
                    out[b, head, t] = (score.softmax(0) @ value[seen][visible]).to(out.dtype)
                    lse[b, head, t] = score.logsumexp(0)
    return (out, lse) if return_lse else out


def attention_mass(
    query: Tensor,
    key_pages: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    *,
    lse: Tensor | None = None,
    causal: bool = True,
    window: int | None = None,
    sinks: int = 0,
    key_bias: Tensor | None = None,
    scale: float | None = None,
    key_scales: Tensor | None = None,
) -> Tensor:
    """The columns of the softmax, summed over the queries and heads of a group."""
    batch, heads, queries, dim = query.shape
    blocks, key_heads, block_size, _ = key_pages.shape
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    if key_scales is not None:
        key_pages = key_pages.to(wide) * key_scales[..., None, None]
    scale = dim**-0.5 if scale is None else scale
    tokens = block_table.shape[1] * block_size
    mass = torch.zeros(batch, key_heads, tokens, dtype=wide, device=query.device)
    if key_bias is not None:
        key_bias = key_bias.to(wide).expand(blocks, key_heads, block_size)
    for b in range(batch):
        length = int(seq_lens[b])
        j = torch.arange(length, device=query.device)
        block, slot = block_table[b].long()[j // block_size], j % block_size
        for head in range(heads):
            h = head // (heads // key_heads)
            key = key_pages[block, h, slot].to(wide)
            for t in range(queries):
                seen = _sees(length - queries + t, j, causal, window, sinks)
                score = key @ query[b, head, t].to(wide) * scale
                if key_bias is not None:
                    bias = key_bias[block, h, slot]
                    seen &= bias != -torch.inf
                    score = score + bias
                seen &= score != -torch.inf
                score = score[seen]
                share = score.softmax(0) if lse is None else (score - lse[b, head, t]).exp()
                mass[b, h, :length][seen] += share
    return mass


def block_summaries(
    key_pages: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    kind: str = "minmax",
    *,
    key_scales: Tensor | None = None,
) -> Tensor:
    """Minimum and maximum, or mean, of the keys of each block; zeros where there are none."""
    batch, width = block_table.shape
    _, heads, block_size, dim = key_pages.shape
    wide = torch.float64 if key_pages.dtype == torch.float64 else torch.float32
    sizes = (batch, heads, width, 2, dim) if kind == "minmax" else (batch, heads, width, dim)
    summaries = torch.zeros(sizes, dtype=wide, device=key_pages.device)
    if key_scales is not None:
        key_pages = key_pages.to(wide) * key_scales[..., None, None]
    for b in range(batch):
        for i in range(-(-int(seq_lens[b]) // block_size)):
            count = min(block_size, int(seq_lens[b]) - i * block_size)
            keys = key_pages[block_table[b, i], :, :count].to(wide)
            if kind == "minmax":
                summaries[b, :, i] = torch.stack([keys.amin(1), keys.amax(1)], 1)
            else:
                summaries[b, :, i] = keys.mean(1)
    return summaries


def update_block_summaries_(
    summaries: Tensor,
    key_pages: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    positions: Tensor,
    key_scales: Tensor | None = None,
) -> None:
    """The summaries, by place in the pages, of the blocks that hold a position; -1 is none."""
    kind = "minmax" if summaries.dim() == 4 else "mean"
    fresh = block_summaries(key_pages, block_table, seq_lens, kind, key_scales=key_scales)
    for b, row in enumerate(positions.tolist()):
        for i in {position // key_pages.shape[2] for position in row if position >= 0}:
            summaries[block_table[b, i]] = fresh[b, :, i]


def score_blocks(query: Tensor, summaries: Tensor, block_table: Tensor | None = None) -> Tensor:
    """Per key head, the largest score of a block over query heads and positions."""
    if block_table is not None:
        absent = (block_table < 0)[:, :, None]
        summaries = summaries[block_table.clamp(min=0).long()]
        summaries = summaries.masked_fill(
            absent.view(absent.shape + (1,) * (summaries.dim() - 3)), 0
        )
        summaries = summaries.transpose(1, 2)
    batch, heads, queries, dim = query.shape
    key_heads = summaries.shape[1]
    # Heads of a group and positions in one dimension.
    q = query.to(summaries.dtype).reshape(batch, key_heads, -1, 1, dim)
    if summaries.dim() == 5:
        low, high = summaries[:, :, None, :, 0], summaries[:, :, None, :, 1]
        products = torch.maximum(q * low, q * high)
    else:
        products = q * summaries[:, :, None]
    return products.sum(-1).amax(2)


def select_blocks(
    scores: Tensor,
    k: int,
    *,
    seq_lens: Tensor,
    block_size: int,
    sink_blocks: int = 1,
    recent_blocks: int = 1,
) -> Tensor:
    """The first and last blocks and the best of the others; of equal scores the lowest block."""
    batch, heads, _ = scores.shape
    selected = torch.full((batch, heads, k), -1, dtype=torch.int32, device=scores.device)
    for b in range(batch):
        blocks = -(-int(seq_lens[b]) // block_size)
        for h in range(heads):
            row = [float("-inf") if x != x else x for x in scores[b, h, :blocks].tolist()]
            kept = {i for i in range(blocks) if i < sink_blocks or i >= blocks - recent_blocks}
            ranked = sorted((i for i in range(blocks) if i not in kept), key=lambda i: -row[i])
            chosen = sorted(kept | set(ranked[: k - len(kept)]))
            selected[b, h, : len(chosen)] = torch.tensor(chosen, dtype=torch.int32)
    return selected


def score_select_blocks(
    query: Tensor,
    summaries: Tensor,
    k: int,
    *,
    seq_lens: Tensor,
    block_size: int,
    block_table: Tensor | None = None,
    sink_blocks: int = 1,
    recent_blocks: int = 1,
) -> Tensor:
    """Select by the scores of the blocks."""
    return select_blocks(
        score_blocks(query, summaries, block_table),
        k,
        seq_lens=seq_lens,
        block_size=block_size,
        sink_blocks=sink_blocks,
        recent_blocks=recent_blocks,
    )


def compact_pages_(pages: Tensor, block_table: Tensor, keep: Tensor) -> None:
    """The i-th kept token of each row moves to position i."""
    layers, _, heads, block_size, _ = pages.shape
    before = pages.clone()
    keep = keep.expand(layers, -1, heads, -1)
    for layer in range(layers):
        for b in range(keep.shape[1]):
            for h in range(heads):
                for i, j in enumerate(keep[layer, b, h].tolist()):
                    if j >= 0:
                        source = block_table[b, j // block_size], h, j % block_size
                        target = block_table[b, i // block_size], h, i % block_size
                        pages[layer][target] = before[layer][source]
