"""Which blocks a step attends; public in :mod:`torch_winnow.kvcache`."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from torch_winnow import _library  # noqa: F401  (registers the operators)
from torch_winnow._fake import check_same_device, register_fake
from torch_winnow._kvcache.arguments import refuse_gradients

# Bound once: a look-up through torch.ops costs as much as a small op.
_block_summaries = torch.ops.winnow.block_summaries
_score_blocks = torch.ops.winnow.score_blocks
_select_blocks = torch.ops.winnow.select_blocks
_score_select_blocks = torch.ops.winnow.score_select_blocks


def block_summaries(
    key_pages: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    kind: Literal["minmax", "mean"] = "minmax",
    *,
    key_scales: Tensor | None = None,
) -> Tensor:
    """A short description of the keys of each block, to score it without reading it.

    ``minmax``: the smallest and the largest value per dimension, from which :func:`score_blocks`
    bounds every key's dot product (Quest: Tang et al., 2024). ``mean``: the mean key (MoBA: Lu et
    al., 2025).

    Args:
        key_pages: ``(num_blocks, Hkv, block_size, D)``, the pages of one layer.
        block_table: ``(B, NB)`` int32.
        seq_lens: ``(B,)`` int32; only the first ``seq_lens[b]`` tokens count.
        kind: ``"minmax"`` or ``"mean"``.
        key_scales: ``(num_blocks, Hkv)`` float32 of quantised pages.

    Returns:
        ``(B, Hkv, NB, 2, D)`` (minimum, maximum) or ``(B, Hkv, NB, D)``, float32 (float64 for
        float64); zeros for blocks without tokens.

    Raises:
        ValueError: on a wrong shape, dtype or kind, for a block outside the pages, and for pages
            that require a gradient (unless gradients are switched off).

    Example:
        >>> import torch
        >>> from torch_winnow.kvcache import block_summaries
        >>> pages = torch.tensor([1.0, 5.0, 3.0, 7.0]).view(1, 1, 4, 1)
        >>> table, lengths = torch.zeros(1, 1, dtype=torch.int32), torch.tensor([3]).int()
        >>> block_summaries(pages, table, lengths).flatten()
        tensor([1., 5.])
    """
    if kind not in ("minmax", "mean"):
        raise ValueError(f"kind: expected 'minmax' or 'mean', got {kind!r}")
    refuse_gradients(key_pages=key_pages)
    return _block_summaries(  # type: ignore[no-any-return]
        key_pages, block_table, seq_lens, kind == "minmax", key_scales
    )


def score_blocks(query: Tensor, summaries: Tensor, block_table: Tensor | None = None) -> Tensor:
    """What each block promises the queries, per key head and unscaled.

    With ``minmax`` summaries an upper bound of ``q . k`` over the keys of the block,
    ``sum_d max(q_d min_d, q_d max_d)``; with ``mean`` ones the dot product with the mean key. The
    largest over the query heads of the group and over all positions counts. The same on every
    instruction set, bitwise.

    Args:
        query: ``(B, Hq, T, D)``.
        summaries: as :func:`block_summaries` returns them; with a ``block_table`` those of the
            blocks of a pool, ``(num_blocks, Hkv, 2, D)`` or ``(num_blocks, Hkv, D)``: one layer of
            :attr:`BlockPool.summaries`.
        block_table: ``(B, NB)`` int32, -1 where there is no block.

    Returns:
        ``(B, Hkv, NB)`` in the dtype of the summaries; 0 for blocks without tokens
        (:func:`select_blocks` knows them by ``seq_lens``), -inf for T = 0.

    Raises:
        ValueError: on a wrong shape or dtype, and for a query or summaries that require a gradient
            (unless gradients are switched off).

    Example:
        >>> import torch
        >>> from torch_winnow.kvcache import score_blocks
        >>> summaries = torch.tensor([[-1.0, 2.0], [-3.0, 0.5]]).view(1, 1, 2, 2, 1)
        >>> score_blocks(torch.full((1, 1, 1, 1), -2.0), summaries)
        tensor([[[2., 6.]]])
    """
    refuse_gradients(query=query, summaries=summaries)
    return _score_blocks(query, summaries, block_table)  # type: ignore[no-any-return]


def select_blocks(
    scores: Tensor,
    k: int,
    *,
    seq_lens: Tensor,
    block_size: int,
    sink_blocks: int = 1,
    recent_blocks: int = 1,
) -> Tensor:
    """The ``k`` blocks to attend: sinks, recent ones, and the best of the others.

    Of equal scores the lowest block is taken, a NaN comes last. A row with at most ``k`` blocks
    keeps them all.

    Args:
        scores: ``(B, Hkv, NB)`` float32 or float64, high is good. A choice has no gradient, so
            scores may require one.
        k: blocks to select, at least ``sink_blocks + recent_blocks``.
        seq_lens: ``(B,)`` int32, from which a row's number of blocks follows.
        block_size: tokens in a block.
        sink_blocks: first blocks, always selected.
        recent_blocks: last blocks, always selected.

    Returns:
        ``(B, Hkv, k)`` int32, ascending, padded with -1, as :func:`paged_attention` takes it.

    Raises:
        ValueError: on a wrong shape, dtype or option.

    Example:
        >>> import torch
        >>> from torch_winnow.kvcache import select_blocks
        >>> scores = torch.tensor([[[0.0, 3.0, 9.0, 4.0, 1.0]]])
        >>> select_blocks(scores, 3, seq_lens=torch.tensor([80]).int(), block_size=16)
        tensor([[[0, 2, 4]]], dtype=torch.int32)
    """
    return _select_blocks(  # type: ignore[no-any-return]
        scores, k, seq_lens, block_size, sink_blocks, recent_blocks
    )


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
    """:func:`score_blocks` and :func:`select_blocks` in one operator, for a step of decoding.

    The same choice, bit for bit; blocks that do not compete are not scored.

    Args:
        query: ``(B, Hq, T, D)``.
        summaries: as in :func:`score_blocks`.
        k: blocks to select, at least ``sink_blocks + recent_blocks``.
        seq_lens: ``(B,)`` int32.
        block_size: tokens in a block.
        block_table: as in :func:`score_blocks`.
        sink_blocks: first blocks, always selected.
        recent_blocks: last blocks, always selected.

    Returns:
        ``(B, Hkv, k)`` int32, ascending, padded with -1.

    Raises:
        ValueError: on a wrong shape, dtype or option, and for a query or summaries that require a
            gradient (unless gradients are switched off).

    Example:
        >>> import torch
        >>> from torch_winnow.kvcache import BlockPool, PagedKVCache, score_select_blocks
        >>> pool = BlockPool(8, num_layers=1, num_kv_heads=1, head_dim=2, block_size=2,
        ...                  dtype=torch.float32, summaries="minmax")
        >>> cache = PagedKVCache(pool, batch_size=1)
        >>> key = torch.tensor([0.0, 1, 2, 0, 9, 0, 3, 1, 0, 0]).repeat(2, 1).T[None, None]
        >>> key = key.contiguous()
        >>> cache.append(0, key, key)
        >>> score_select_blocks(
        ...     torch.ones(1, 1, 1, 2), pool.summaries[0], 3,
        ...     seq_lens=cache.seq_lens, block_size=2, block_table=cache.block_table,
        ... )
        tensor([[[0, 2, 4]]], dtype=torch.int32)
    """
    refuse_gradients(query=query, summaries=summaries)
    return _score_select_blocks(  # type: ignore[no-any-return]
        query, summaries, k, seq_lens, block_size, block_table, sink_blocks, recent_blocks
    )


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


@register_fake("block_summaries")
def _(
    key_pages: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    minmax: bool = True,
    key_scales: Tensor | None = None,
) -> Tensor:
    check_same_device(key_pages=key_pages, block_table=block_table, seq_lens=seq_lens)
    check_same_device(key_pages=key_pages, key_scales=key_scales)
    batch, width = block_table.shape
    _, heads, _, dim = key_pages.shape
    sizes = (batch, heads, width, 2, dim) if minmax else (batch, heads, width, dim)
    return key_pages.new_empty(sizes, dtype=_wide(key_pages))


@register_fake("update_block_summaries_")
def _(
    summaries: Tensor,
    key_pages: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    positions: Tensor,
    key_scales: Tensor | None = None,
) -> None:
    check_same_device(summaries=summaries, key_pages=key_pages, block_table=block_table)
    check_same_device(summaries=summaries, seq_lens=seq_lens, positions=positions)
    check_same_device(summaries=summaries, key_scales=key_scales)


@register_fake("score_blocks")
def _(query: Tensor, summaries: Tensor, block_table: Tensor | None = None) -> Tensor:
    check_same_device(query=query, summaries=summaries, block_table=block_table)
    blocks = summaries.shape[2] if block_table is None else block_table.shape[1]
    return summaries.new_empty(query.shape[0], summaries.shape[1], blocks)


@register_fake("select_blocks")
def _(
    scores: Tensor,
    k: int,
    seq_lens: Tensor,
    block_size: int,
    sink_blocks: int = 1,
    recent_blocks: int = 1,
) -> Tensor:
    check_same_device(scores=scores, seq_lens=seq_lens)
    return scores.new_empty((*scores.shape[:2], k), dtype=torch.int32)


@register_fake("score_select_blocks")
def _(
    query: Tensor,
    summaries: Tensor,
    k: int,
    seq_lens: Tensor,
    block_size: int,
    block_table: Tensor | None = None,
    sink_blocks: int = 1,
    recent_blocks: int = 1,
) -> Tensor:
    check_same_device(query=query, summaries=summaries, seq_lens=seq_lens, block_table=block_table)
    return query.new_empty((query.shape[0], summaries.shape[1], k), dtype=torch.int32)
