"""Dropping tokens from the middle of a cache: what :meth:`PagedKVCache.compact_` does.

And what merging shares with it: blocks are claimed first, tokens then find new places in them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from torch_winnow import _library  # noqa: F401  (registers the operators)
from torch_winnow._fake import check_same_device, register_fake
from torch_winnow._kvcache import pages
from torch_winnow._kvcache.mirror import sent

if TYPE_CHECKING:
    from torch_winnow._kvcache.storage import PagedKVCache

# Bound once: a look-up through torch.ops costs as much as a small op.
_compact_pages_ = torch.ops.winnow.compact_pages_


def compact(cache: PagedKVCache, keep: Tensor) -> None:
    """Keep the tokens at ``keep``; all checks come first."""
    check_movable(cache)
    keep = _checked(cache, keep)
    held = keep >= 0
    lengths = held.sum(-1)
    if not (lengths == lengths[:1, :, :1]).all():
        raise ValueError(
            "keep: expected as many positions for every head and layer of a row, because they "
            f"share its length, got counts {lengths.amin((0, 2)).tolist()} to "
            f"{lengths.amax((0, 2)).tolist()} in the rows"
        )
    # Behind the first token that moves, in any head or layer, all others move.
    place = torch.arange(keep.shape[3])
    moves = (held & (keep != place)).any(0).any(1)
    targets = torch.where(moves, place, -1)
    pool = cache.pool
    with pool._lock:
        # From here on a row shares no block that any row writes to.
        claim(cache, targets)
        table = cache.block_table
        keep = sent(keep, pool.device)
        if pool.quantised:
            _requantise(cache, keep, targets)
        else:
            for moved in (pool.key_pages, pool.value_pages):
                _compact_pages_(moved, table, keep)
        if pool.key_bias is not None:
            _compact_pages_(pool.key_bias[..., None], table, keep)
        finish(cache, lengths[0, :, 0], targets)


def check_movable(cache: PagedKVCache) -> None:
    """Raise where somebody counts on each token's position, or some layer has not stored it yet."""
    if cache._holder is not None:
        raise RuntimeError(
            f"PagedKVCache: the tokens of {cache._holder} stay where they are, because it counts "
            "them itself; drop or merge tokens in a fork of its pages"
        )
    if not cache._native.even():
        raise ValueError(
            "cache: every layer must have stored the same tokens before some are dropped or "
            "merged; append to the layers that are behind first"
        )


def claim(cache: PagedKVCache, positions: Tensor) -> None:
    """Make the blocks of positions, -1 for none, this cache's alone, with all that they hold.

    Called with the pool's lock, which is held until the tokens are stored.
    """
    cache._check_not_waiting()
    arguments = 0, positions.shape[1], positions.data_ptr(), True
    if cache.pool._with_room(cache, cache._native.write, *arguments):
        cache._mirror.follow()
        pages.copy_blocks(cache.pool, *cache._native.copies())


def begun(cache: PagedKVCache, positions: Tensor) -> Tensor:
    """The blocks whose first slot is at one of ``positions``: 0, 1, ... in order, or -1."""
    table = cache.block_table
    firsts = positions[:, :: cache.pool.block_size][:, : table.shape[1]] >= 0
    return table[:, : firsts.shape[1]][sent(firsts, cache.pool.device)]


def finish(cache: PagedKVCache, lengths: Tensor, positions: Tensor) -> None:
    """Give up what lies behind the new lengths; tell autograd and the summaries of all layers."""
    pool = cache.pool
    cache.truncate_(lengths)
    pages.mark_written(*pool._pages().values())
    for layer in range(pool.num_layers):
        pages.summarise(pool, layer, cache._mirror, positions)


def _requantise(cache: PagedKVCache, keep: Tensor, targets: Tensor) -> None:
    """Store the kept tokens at their places anew: blocks have scales of their own."""
    pool, table = cache.pool, cache.block_table
    if not (targets >= 0).any():
        return
    position = keep.clamp(min=0).expand(pool.num_layers, -1, pool.num_kv_heads, -1)
    row = torch.arange(cache.batch_size, device=keep.device)[:, None, None]
    head = torch.arange(pool.num_kv_heads, device=keep.device)[:, None]
    anew = begun(cache, targets)
    for layer, at in enumerate(position):
        block = table[row, at // pool.block_size].clamp(min=0).long()
        key, value = (
            codes[block, head, at % pool.block_size].float() * scales[block, head][..., None]
            for codes, scales in zip(pool._layers[layer], pool._scales[layer], strict=True)
        )
        pages.start_anew(pool, layer, anew)
        pages.store(pool, layer, key, value, cache._mirror, targets)


def _checked(cache: PagedKVCache, keep: Tensor) -> Tensor:
    """``keep`` as ``(num_layers or 1, B, Hkv or 1, K)`` int64 on the CPU."""
    layers, rows, heads = cache.pool.num_layers, cache.batch_size, cache.pool.num_kv_heads
    shapes = {2: (rows,), 3: (rows, heads), 4: (layers, rows, heads)}
    if not isinstance(keep, Tensor) or keep.shape[:-1] != shapes.get(keep.dim()):
        got = tuple(keep.shape) if isinstance(keep, Tensor) else repr(keep)
        raise ValueError(
            "keep: expected (B, K), (B, Hkv, K) or (num_layers, B, Hkv, K) with "
            f"num_layers={layers}, B={rows} and Hkv={heads}, got {got}"
        )
    if keep.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"keep: expected int32 or int64, got {keep.dtype}")
    keep = keep.to(device="cpu", dtype=torch.int64)
    keep = keep[None, :, None] if keep.dim() == 2 else keep[None] if keep.dim() == 3 else keep
    keep = keep.contiguous()
    before, after = keep[..., :-1], keep[..., 1:]
    ascends = (after == -1) | ((before >= 0) & (after > before))
    lengths = cache.seq_lens.cpu()
    inside = ((keep >= -1) & (keep < lengths[:, None, None])).all(-1)
    wrong = ~(ascends.all(-1) & inside).all(0).all(-1)
    if wrong.any():
        row = int(wrong.int().argmax())
        raise ValueError(
            "keep: expected ascending positions with 0 <= position < seq_len, then -1, got "
            f"{keep[:, row].tolist()} in row {row} of {int(lengths[row])} tokens"
        )
    return keep


@register_fake("compact_pages_")
def _(pages: Tensor, block_table: Tensor, keep: Tensor) -> None:
    check_same_device(pages=pages, block_table=block_table, keep=keep)
