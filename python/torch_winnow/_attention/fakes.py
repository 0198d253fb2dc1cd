"""Fake kernels: shapes, dtypes and devices only; the kernels check the arguments.

A backward's tensors come from autograd, on the device of the forward's: they need no check.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torch_winnow import _library  # noqa: F401  (registers the operators)
from torch_winnow._fake import check_same_device, register_fake


def _fake_forward(query: Tensor) -> tuple[Tensor, Tensor]:
    statistics = torch.float64 if query.dtype == torch.float64 else torch.float32
    return query.new_empty(query.shape), query.new_empty(query.shape[:-1], dtype=statistics)


def _contiguous_like(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(tensor.new_empty(tensor.shape) for tensor in tensors)


@register_fake("cat_attention")
def _(
    query: Tensor, key: Tensor, value: Tensor, block_size: int, scale: float | None
) -> tuple[Tensor, Tensor]:
    check_same_device(query=query, key=key, value=value)
    return _fake_forward(query)


@register_fake("chunk_attention")
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    slot_key: Tensor,
    slot_value: Tensor,
    chunk_size: int,
    slots_per_chunk: int,
    initial_slots: int,
    lookback: int,
    scale: float | None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    check_same_device(query=query, key=key, value=value, slot_key=slot_key, slot_value=slot_value)
    # A meta query may come with lengths that lie on the CPU.
    if query.device.type != "meta" or (cu_seqlens is not None and not cu_seqlens.is_cpu):
        check_same_device(query=query, cu_seqlens=cu_seqlens)
    return _fake_forward(query)


@register_fake("block_diagonal_attention")
def _(
    query: Tensor, key: Tensor, value: Tensor, block_size: int, causal: bool, scale: float | None
) -> tuple[Tensor, Tensor]:
    check_same_device(query=query, key=key, value=value)
    return _fake_forward(query)


@register_fake("merge_attention")
def _(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    if not outs:
        raise ValueError("outs: expected at least one partial result, got none")
    parts = {f"outs[{i}]": out for i, out in enumerate(outs)}
    check_same_device(**parts, **{f"lses[{i}]": lse for i, lse in enumerate(lses)})
    return _fake_forward(outs[0])


@register_fake("cat_attention_backward")
@register_fake("block_diagonal_attention_backward")
def _(
    grad_out: Tensor,
    grad_lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *rest: Any,
    **options: Any,
) -> tuple[Tensor, ...]:
    return _contiguous_like(query, key, value)


@register_fake("chunk_attention_backward")
def _(
    grad_out: Tensor,
    grad_lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    slot_key: Tensor,
    slot_value: Tensor,
    *rest: Any,
    **options: Any,
) -> tuple[Tensor, ...]:
    return _contiguous_like(query, key, value, slot_key, slot_value)


@register_fake("merge_attention_backward")
def _(
    grad_out: Tensor,
    grad_lse: Tensor,
    outs: Sequence[Tensor],
    lses: Sequence[Tensor],
    out: Tensor,
    lse: Tensor,
) -> tuple[Tensor, Tensor]:
    return out.new_empty((len(outs), *out.shape)), lse.new_empty((len(outs), *lse.shape))
