"""Attention over pages; public in :mod:`torch_winnow.kvcache`."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from torch_winnow import _library  # noqa: F401  (registers the operators)
from torch_winnow._fake import check_same_device, register_fake
from torch_winnow._kvcache.arguments import refuse_gradients

# Bound once: a look-up through torch.ops costs as much as a small op.
_paged_attention = torch.ops.winnow.paged_attention


@overload
def paged_attention(
    query: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    *,
    causal: bool = ...,
    block_indices: Tensor | None = ...,
    window: int | None = ...,
    sinks: int = ...,
    key_bias: Tensor | None = ...,
    scale: float | None = ...,
    key_scales: Tensor | None = ...,
    value_scales: Tensor | None = ...,
    return_lse: Literal[False] = ...,
) -> Tensor: ...
@overload
def paged_attention(
    query: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    *,
    causal: bool = ...,
    block_indices: Tensor | None = ...,
    window: int | None = ...,
    sinks: int = ...,
    key_bias: Tensor | None = ...,
    scale: float | None = ...,
    key_scales: Tensor | None = ...,
    value_scales: Tensor | None = ...,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...
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
    """Attention of the last ``T`` positions of each sequence over its pages.

    Query ``t`` of row ``b`` stands at position ``i = seq_lens[b] - T + t``. It sees the keys
    ``j < seq_lens[b]`` with ``j <= i`` (unless ``causal=False``), within ``window``, and in the
    chosen blocks. Each key is read once for all query heads of its group, and where rows share
    blocks (forks of one prefix) once for all of those rows. Where a block lies in the pool never
    changes a result, nor do the other rows or the number of threads. What a query may not see never
    reaches its result, even NaN.

    Args:
        query: ``(B, Hq, T, D)`` float32, bfloat16, float16 or float64; any strides, the last
            dimension contiguous. ``Hq`` is a multiple of ``Hkv``.
        key_pages: ``(num_blocks, Hkv, block_size, D)``, one layer of :attr:`BlockPool.key_pages`,
            dtype as in query, or int8 or float8_e4m3fn with scales.
        value_pages: ``(num_blocks, Hkv, block_size, Dv)``.
        block_table: ``(B, max_blocks)`` int32: the block of each ``block_size`` positions, -1 where
            there is none.
        seq_lens: ``(B,)`` int32: tokens of each row.
        causal: whether a query sees no later position.
        block_indices: ``(B, K)`` or, per key head, ``(B, Hkv, K)`` int32: the logical blocks
            (``position // block_size``) to attend, ascending, -1 for none. Default: all.
        window: a query sees ``i - j < window``, without ``causal`` ``|i - j| < window``.
        sinks: with a window, the first ``sinks`` positions are seen as well.
        key_bias: ``(num_blocks, Hkv, block_size)``, or broadcastable to it: added to the scaled
            scores of a key, for instance the log of how many tokens it stands for. -inf hides it.
            float32, bfloat16 or float16, whatever the dtype of query; float64 with a float64 query
            only.
        scale: of the scores; ``D**-0.5`` by default.
        key_scales: ``(num_blocks, Hkv)`` float32, one layer of :attr:`BlockPool.key_scales`: what
            the codes of a block are multiplied by, needed with quantised pages (and with a float32,
            bfloat16 or float16 query). int8 codes lie in [-127, 127].
        value_scales: likewise.
        return_lse: also return the natural log of the sum of exponentials.

    Returns:
        ``(B, Hq, T, Dv)`` in the dtype of query, and with ``return_lse`` ``(B, Hq, T)`` float32
        (float64 for float64). A query that sees nothing gives zeros and an lse of -inf.

    Raises:
        ValueError: on a wrong shape, dtype or option, on a block outside the pages, on a selection
            that does not ascend, and for a query, pages or a bias that require a gradient (unless
            gradients are switched off).

    Example:
        >>> import torch
        >>> from torch_winnow.kvcache import paged_attention
        >>> pages = torch.randn(4, 2, 16, 8)  # 4 blocks, 2 key heads, 16 tokens each
        >>> table = torch.tensor([[3, 1], [0, -1]], dtype=torch.int32)
        >>> lengths = torch.tensor([20, 7], dtype=torch.int32)
        >>> out, lse = paged_attention(
        ...     torch.randn(2, 4, 1, 8), pages, pages, table, lengths, return_lse=True
        ... )
        >>> out.shape, lse.shape
        (torch.Size([2, 4, 1, 8]), torch.Size([2, 4, 1]))
    """
    refuse_gradients(query=query, key_pages=key_pages, value_pages=value_pages, key_bias=key_bias)
    out, lse = _paged_attention(
        query,
        key_pages,
        value_pages,
        block_table,
        seq_lens,
        causal,
        block_indices,
        window,
        sinks,
        key_bias,
        scale,
        key_scales,
        value_scales,
    )
    return (out, lse) if return_lse else out


@register_fake("paged_attention")
def _(
    query: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    causal: bool = True,
    block_indices: Tensor | None = None,
    window: int | None = None,
    sinks: int = 0,
    key_bias: Tensor | None = None,
    scale: float | None = None,
    key_scales: Tensor | None = None,
    value_scales: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    check_same_device(query=query, key_pages=key_pages, value_pages=value_pages)
    check_same_device(query=query, block_table=block_table, seq_lens=seq_lens)
    check_same_device(query=query, block_indices=block_indices, key_bias=key_bias)
    check_same_device(query=query, key_scales=key_scales, value_scales=value_scales)
    batch, heads, queries, _ = query.shape
    lse_dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    return (
        query.new_empty(batch, heads, queries, value_pages.shape[-1]),
        query.new_empty(batch, heads, queries, dtype=lse_dtype),
    )
