"""Definitions of the attention operators: a boolean mask, one softmax, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def _statistics(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    scale: float | None,
    return_lse: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    """``mask`` (N, M) bool; a row without a true entry gives zeros and ``lse = -inf``."""
    group = query.shape[1] // max(key.shape[1], 1)
    q = _statistics(query)
    k = _statistics(key).repeat_interleave(group, dim=1)
    v = _statistics(value).repeat_interleave(group, dim=1)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = (q @ k.transpose(-1, -2) * scale).masked_fill(~mask, -torch.inf)
    # One more column, so that no row is empty; it has no weight.
    top = F.pad(scores.detach(), (0, 1), value=-torch.inf).amax(-1, keepdim=True)
    weights = torch.exp(scores - torch.where(top == -torch.inf, 0.0, top))
    total = weights.sum(-1, keepdim=True)
    some = total != 0
    total = torch.where(some, total, 1.0)
    weights = weights / total
    finite = torch.isfinite(v)
    out = weights @ torch.where(finite, v, 0.0)
    # A key whose value is infinite or NaN counts for the rows that see it alone: 0 * NaN is NaN.
    for i in (~finite.all(-1)).flatten(0, 1).any(0).nonzero().flatten().tolist():
        rest = torch.where(finite[:, :, i], 0.0, v[:, :, i])
        seen = mask[:, i, None] & some  # a row whose scores are all -inf stays zero
        out = out + torch.where(seen, weights[..., i, None] * rest[:, :, None], 0.0)
    lse = torch.where(some, top + total.log(), -torch.inf).squeeze(-1)
    return (out.to(query.dtype), lse) if return_lse else out.to(query.dtype)


def cat_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    block_size: int,
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Row j may attend row i iff ``i <= j`` and (same block, or i begins a block)."""
    row = torch.arange(query.shape[2])
    j, i = row[:, None], row[None, :]
    mask = (i <= j) & ((i // block_size == j // block_size) | (i % block_size == 0))
    return _attend(query, key, value, mask, scale, return_lse)


def chunk_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    slot_key: Tensor,
    slot_value: Tensor,
    *,
    chunk_size: int,
    slots_per_chunk: int = 1,
    initial_slots: int = 1,
    lookback: int = 0,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Token t of chunk i sees slots ``[0, initial_slots + i*slots_per_chunk)`` and tokens
    ``[max(0, (i-lookback)*chunk_size), t]``; with ``cu_seqlens``, within its own sequence."""
    rows, slots = query.shape[2], slot_key.shape[2]
    seqlens = [0, rows] if cu_seqlens is None else cu_seqlens.tolist()
    mask = torch.zeros(rows, slots + rows, dtype=torch.bool)
    first_slot = 0
    for begin, end in zip(seqlens[:-1], seqlens[1:], strict=True):
        row = torch.arange(end - begin)
        chunk = (row // chunk_size)[:, None]
        slot = torch.arange(slots - first_slot)
        mask[begin:end, first_slot:slots] = slot < initial_slots + chunk * slots_per_chunk
        mask[begin:end, slots + begin : slots + end] = ((chunk - lookback) * chunk_size <= row) & (
            row <= row[:, None]
        )
        chunks = -((begin - end) // chunk_size)
        first_slot += initial_slots + max(chunks - 1, 0) * slots_per_chunk
    keys = torch.cat([slot_key, key], dim=2)
    values = torch.cat([slot_value, value], dim=2)
    return _attend(query, keys, values, mask, scale, return_lse)


def block_diagonal_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    block_size: int,
    causal: bool = False,
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Each block of ``block_size`` rows attends only to itself."""
    row = torch.arange(query.shape[2])
    j, i = row[:, None], row[None, :]
    mask = i // block_size == j // block_size
    if causal:
        mask = mask & (i <= j)
    return _attend(query, key, value, mask, scale, return_lse)


def merge_attention(
    outs: Sequence[Tensor] | Tensor, lses: Sequence[Tensor] | Tensor
) -> tuple[Tensor, Tensor]:
    """``lse = log sum exp(lse_p)``, ``out = sum exp(lse_p - lse) out_p``; -inf has no weight."""
    stacked = torch.stack(list(outs))
    lse_parts = _statistics(torch.stack(list(lses)))
    top = lse_parts.detach().amax(0)
    weights = torch.exp(lse_parts - torch.where(top == -torch.inf, 0.0, top))
    total = weights.sum(0)
    some = total != 0
    total = torch.where(some, total, 1.0)
    share = (weights / total)[..., None]
    parts = torch.where(lse_parts[..., None] == -torch.inf, 0.0, _statistics(stacked))
    out = (share * parts).sum(0).to(stacked.dtype)
    return out, torch.where(some, top + total.log(), -torch.inf)
