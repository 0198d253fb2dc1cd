"""What is written to the blocks of a pool: tokens, copies, biases and summaries.

Called with the pool's lock, by caches whose rows own the blocks alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from torch_winnow import _library  # noqa: F401  (registers the operators)
from torch_winnow._fake import check_same_device, register_fake
from torch_winnow._kvcache.mirror import TableMirror, sent

if TYPE_CHECKING:
    from torch_winnow._kvcache.pool import BlockPool

# Bound once: a look-up through torch.ops costs as much as a small op.
_paged_write_ = torch.ops.winnow.paged_write_
_paged_quantise_ = torch.ops.winnow.paged_quantise_
_copy_blocks_ = torch.ops.winnow.copy_blocks_
_update_block_summaries_ = torch.ops.winnow.update_block_summaries_


def mark_written(*pages: Tensor) -> None:
    """Let autograd see that what it saved for a backward pass has changed."""
    if not pages[0].is_inference():
        torch.autograd.graph.increment_version(pages)


def copy_blocks(pool: BlockPool, sources: list[int], targets: list[int]) -> None:
    """Copy all that blocks own, in every layer."""
    source, target = (sent(torch.tensor(x), pool.device) for x in (sources, targets))
    _copy_blocks_(pool.key_pages, pool.value_pages, source, target)
    mark_written(pool.key_pages, pool.value_pages)
    for name, pages in pool._pages().items():
        if name not in ("key_pages", "value_pages"):
            pages[:, target] = pages[:, source]


def start_anew(pool: BlockPool, layer: int | slice, blocks: Tensor) -> None:
    """Forget the scales of blocks: what they held before is no measure for what they will hold."""
    for scales in (pool.key_scales, pool.value_scales):
        if scales is not None:
            scales[layer, blocks] = 0


def store(
    pool: BlockPool, layer: int, key: Tensor, value: Tensor, mirror: TableMirror, positions: Tensor
) -> None:
    """Store tokens, quantised where the pool holds codes; a position of -1 is nowhere."""
    pages, scales = pool._layers[layer], pool._scales[layer]
    where = mirror.table, mirror.positions(positions)
    if scales:
        _paged_quantise_(*pages, *scales, key, value, *where)
    else:
        _paged_write_(*pages, key, value, *where)
    mark_written(*pages, *scales)


def store_bias(
    pool: BlockPool,
    layer: int,
    mirror: TableMirror,
    positions: Tensor,
    bias: Tensor | None = None,
) -> None:
    """The bias ``(B, Hkv, T)`` of the tokens at ``positions``; 0, that of one token."""
    if pool.key_bias is None:
        return
    pages = pool.key_bias[layer, ..., None]
    if bias is None:
        bias = pages.new_zeros(()).expand(len(positions), pool.num_kv_heads, positions.shape[1])
    # Keys of one dimension and values of none.
    tokens = bias[..., None]
    where = mirror.table, mirror.positions(positions)
    _paged_write_(pages, pages[..., :0], tokens, tokens[..., :0], *where)
    mark_written(pool.key_bias)


def summarise(pool: BlockPool, layer: int, mirror: TableMirror, positions: Tensor) -> None:
    """Describe the blocks anew whose tokens at ``positions`` have been stored."""
    if pool.summaries is None:
        return
    _update_block_summaries_(
        pool.summaries[layer],
        pool._layers[layer][0],
        mirror.table,
        mirror.lengths,
        mirror.positions(positions),
        *pool._scales[layer][:1],
    )
    mark_written(pool.summaries)


@register_fake("paged_write_")
def _(
    key_pages: Tensor,
    value_pages: Tensor,
    key: Tensor,
    value: Tensor,
    block_table: Tensor,
    positions: Tensor,
) -> None:
    check_same_device(key_pages=key_pages, value_pages=value_pages, key=key, value=value)
    check_same_device(key_pages=key_pages, block_table=block_table, positions=positions)


@register_fake("paged_quantise_")
def _(
    key_pages: Tensor,
    value_pages: Tensor,
    key_scales: Tensor,
    value_scales: Tensor,
    key: Tensor,
    value: Tensor,
    block_table: Tensor,
    positions: Tensor,
) -> None:
    check_same_device(key_pages=key_pages, value_pages=value_pages, key=key, value=value)
    check_same_device(key_pages=key_pages, key_scales=key_scales, value_scales=value_scales)
    check_same_device(key_pages=key_pages, block_table=block_table, positions=positions)


@register_fake("copy_blocks_")
def _(key_pages: Tensor, value_pages: Tensor, source: Tensor, target: Tensor) -> None:
    check_same_device(key_pages=key_pages, value_pages=value_pages, source=source, target=target)
