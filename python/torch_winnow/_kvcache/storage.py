"""The caches that live in a pool of pages; public in :mod:`torch_winnow.kvcache`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn, SupportsIndex

import torch
from torch import Tensor

from torch_winnow import _core
from torch_winnow._kvcache import pages
from torch_winnow._kvcache.arguments import check_tokens, integer, integers, token_positions
from torch_winnow._kvcache.compaction import compact
from torch_winnow._kvcache.mirror import TableMirror, sent
from torch_winnow._kvcache.pool import BlockPool

# What CacheTable.append reports.
_COPIES, _RESHAPED, _FRESH, _MOVED = 1, 2, 4, 8


class PagedKVCache:
    """Keys and values of ``batch_size`` sequences, in blocks of a pool.

    **Layers.** Every layer fills the same positions of the same blocks, each from its own end: a
    layer's ``append`` stores its tokens behind what this layer has stored in the row. ``seq_lens``
    is the length of the furthest layer, so it grows with the first layer's append of a step,
    whichever layer that is, and the others catch up; a layer may also take several steps' tokens in
    one append. Positions that a layer has not filled yet hold whatever the pages held.

    **Sharing.** :meth:`fork` and :meth:`permute_` copy no keys: rows share blocks. Before a row
    writes to a block with several owners, that block is copied, for all layers; the last owner
    keeps the original, so K owners cost K - 1 copies.

    **Threads.** Different caches on a pool may be used by different threads; see
    :class:`BlockPool`.

    **Errors.** An operation that raises, for want of blocks too, has changed nothing. Rows,
    parents, ancestors and lengths are lists of integers or one-dimensional integer tensors, for one
    row as well: ``free([0])``. A bare integer is refused; an empty tensor may have any dtype.

    **Copies.** ``copy.copy``, ``copy.deepcopy`` and pickling are refused, since a copy would share
    the table and not know it: ``cache.fork(range(cache.batch_size))`` continues every row.

    Args:
        pool: where the blocks come from; any number of caches may share it.
        batch_size: rows, at least 0; they begin empty.

    Raises:
        ValueError: on another pool, or a batch size that is no integer or below 0.

    Attributes:
        pool: the :class:`BlockPool`.
        batch_size: number of rows.

    Example:
        >>> import torch
        >>> from torch_winnow.kvcache import BlockPool, PagedKVCache
        >>> pool = BlockPool(4, num_layers=1, num_kv_heads=1, head_dim=2, block_size=4,
        ...                  dtype=torch.float32)
        >>> cache = PagedKVCache(pool, batch_size=2)
        >>> cache.append(0, torch.ones(2, 1, 3, 2), torch.ones(2, 1, 3, 2))
        >>> cache.permute_([1, 1])  # both rows continue row 1: its block has two owners now
        >>> pool.num_free_blocks
        3
        >>> cache.append(0, torch.ones(2, 1, 1, 2), torch.ones(2, 1, 1, 2))
        >>> pool.num_free_blocks, cache.seq_lens
        (2, tensor([4, 4], dtype=torch.int32))
        >>> draft = cache.fork([0, 0, 1])
        >>> draft.append(0, torch.ones(3, 1, 2, 2), torch.ones(3, 1, 2, 2), lengths=[2, 1, 0])
        >>> draft.seq_lens, pool.num_free_blocks
        (tensor([6, 5, 4], dtype=torch.int32), 0)
        >>> draft.truncate_([4, 4, 4])
        >>> draft.free([1, 2])
        >>> cache.write(0, *torch.zeros(2, 2, 1, 1, 2), torch.tensor([[0], [2]]))
        >>> pool.key_pages[0, cache.block_table[:, 0], 0, :, 0]
        tensor([[0., 1., 1., 1.],
                [1., 1., 0., 1.]])
    """

    def __init__(self, pool: BlockPool, batch_size: int) -> None:
        if not isinstance(pool, BlockPool):
            raise ValueError(f"pool: expected a BlockPool, got {pool!r} ({type(pool).__name__})")
        batch_size = integer("batch_size", batch_size)
        native = _core.CacheTable(pool._native, batch_size, pool.num_layers, pool.block_size)
        self._adopt(pool, batch_size, native)

    def _adopt(self, pool: BlockPool, batch_size: int, native: _core.CacheTable) -> None:
        self.pool = pool
        self.batch_size = batch_size
        self._native = native
        self._waits = False  # for an eviction hook, which may not change it
        self._holder: str | None = None  # who counts on each token's position
        self._mirror = TableMirror(native, batch_size, pool.device)
        # What an append has to follow: on the CPU lengths and table are the native table's own.
        self._followed = _RESHAPED | _MOVED if self._mirror.is_apart else _RESHAPED
        self._positions = torch.empty(batch_size, 1, dtype=torch.int64)
        self._positions_address = self._positions.data_ptr()

    @property
    def block_table(self) -> Tensor:
        """``(B, max_blocks)`` int32, as wide as the longest row needs, -1 where there is no block.

        The cache keeps writing to it: read it anew after an operation, clone it to keep it, and
        don't write to it (the native table is what counts).
        """
        return self._mirror.table

    @property
    def seq_lens(self) -> Tensor:
        """``(B,)`` int32: tokens of each row in the furthest layer. Kept up to date in place."""
        return self._mirror.lengths

    def append(
        self,
        layer: int,
        key: Tensor,
        value: Tensor,
        *,
        lengths: Sequence[int] | Tensor | None = None,
    ) -> None:
        """Store new tokens of one layer behind those that this layer has stored.

        Args:
            layer: which layer.
            key: ``(B, Hkv, T, D)`` in the pool's dtype (float32, bfloat16 or float16 for a
                quantised pool), last dimension contiguous.
            value: ``(B, Hkv, T, Dv)``.
            lengths: ``B`` counts from 0 to ``T``: row ``b`` stores its first ``lengths[b]`` tokens
                only. Default: all of them.

        Raises:
            BlockPoolExhausted: if the pool has too few free blocks.
            ValueError: on a wrong layer, shape, dtype or length, or a tensor that requires a
                gradient.
        """
        layer = integer("layer", layer)
        check_tokens(self, key, value)
        tokens = key.shape[2]
        if tokens == self._positions.shape[1]:
            positions, address = self._positions, self._positions_address
        else:
            positions = torch.empty(self.batch_size, tokens, dtype=torch.int64)
            address = positions.data_ptr()
        counts = None if lengths is None else integers("lengths", lengths)
        self._check_not_waiting()
        pool = self.pool
        with pool._lock:
            changes = pool._with_room(self, self._native.append, layer, tokens, counts, address)
            if changes & self._followed:
                self._mirror.follow()
            if changes & _COPIES:
                self._copy()
            if changes & _FRESH and pool.quantised:
                fresh = sent(torch.tensor(self._native.fresh), pool.device)
                pages.start_anew(pool, slice(None), fresh)
            self._store(layer, key, value, positions)

    def write(self, layer: int, key: Tensor, value: Tensor, positions: Tensor) -> None:
        """Overwrite tokens of one layer in place.

        Args:
            layer: which layer.
            key: ``(B, Hkv, T, D)`` in the pool's dtype (float32, bfloat16 or float16 for a
                quantised pool), last dimension contiguous.
            value: ``(B, Hkv, T, Dv)``.
            positions: ``(B, T)`` integers, ``0 <= position < seq_lens[b]``, in any order; of equal
                ones the last wins. On the CPU, also for a pool on a GPU: those of a GPU are
                waited for.

        Raises:
            BlockPoolExhausted: if shared blocks must be copied and the pool has too few.
            ValueError: on a wrong layer, shape, dtype or position, or a tensor that requires a
                gradient.
        """
        layer = integer("layer", layer)
        check_tokens(self, key, value)
        tokens = key.shape[2]
        positions = token_positions(positions, self.batch_size, tokens)
        self._check_not_waiting()
        pool = self.pool
        with pool._lock:
            address = positions.data_ptr()
            if pool._with_room(self, self._native.write, layer, tokens, address):
                self._mirror.follow()
                self._copy()
            self._store(layer, key, value, positions)

    def fork(self, parents: Sequence[int] | Tensor) -> PagedKVCache:
        """A new cache whose row ``r`` continues this one's row ``parents[r]``; rows may repeat.

        Blocks are shared, so it needs none; this cache stays as it is.

        Raises:
            ValueError: on a parent outside ``[0, batch_size)``.
        """
        rows = integers("parents", parents)
        child = PagedKVCache.__new__(PagedKVCache)
        child._adopt(self.pool, len(rows), self._native.fork(rows))
        return child

    def permute_(self, ancestors: Sequence[int] | Tensor) -> None:
        """Row ``r`` becomes a continuation of what was row ``ancestors[r]``: a particle resample.

        Costs table entries, not keys; rows without descendants return their blocks.

        Raises:
            ValueError: unless there are ``batch_size`` ancestors in ``[0, batch_size)``.
        """
        self._check_not_waiting()
        self._native.permute(integers("ancestors", ancestors))
        self._mirror.follow()

    def truncate_(self, lengths: Sequence[int] | Tensor) -> None:
        """Drop the tokens from position ``lengths[b]`` on, in every layer.

        Raises:
            ValueError: unless there are ``batch_size`` lengths with ``0 <= length <= seq_lens[b]``.
        """
        self._check_not_waiting()
        self._native.truncate(integers("lengths", lengths))
        self._mirror.follow()

    def compact_(self, keep: Tensor) -> None:
        """Keep some tokens of each row, in their order, and give up the blocks that this empties.

        The kept tokens move to positions 0, 1, ... of their row; blocks that others hold too are
        left as they are. Keys keep the rotation of the position at which they were stored, so a
        model with rotary embeddings goes on counting its own positions: ``seq_lens`` is no longer
        the number of tokens seen, and a ``window`` counts stored tokens. In a quantised pool what
        moves is quantised anew where it arrives.

        Args:
            keep: positions, ascending, padded with -1 at the end: ``(B, K)``, per key head
                ``(B, Hkv, K)``, or per layer ``(num_layers, B, Hkv, K)``, int32 or int64; as many
                for every head and layer of a row.

        Raises:
            BlockPoolExhausted: if shared blocks must be replaced and the pool has too few.
            RuntimeError: on the ``pages`` of a ``WinnowCache``, which counts its tokens itself.
            ValueError: on a wrong shape, dtype or position, on different counts within a row,
                or while some layer has stored less than the others.

        Example:
            >>> import torch
            >>> from torch_winnow.kvcache import BlockPool, PagedKVCache
            >>> pool = BlockPool(4, num_layers=1, num_kv_heads=1, head_dim=1, block_size=2,
            ...                  dtype=torch.float32)
            >>> cache = PagedKVCache(pool, batch_size=1)
            >>> key = torch.arange(7.0).view(1, 1, 7, 1)
            >>> cache.append(0, key, key)
            >>> cache.compact_(torch.tensor([[0, 3, 6]]))
            >>> pool.key_pages[0, cache.block_table[0]].flatten()[:3], cache.seq_lens
            (tensor([0., 3., 6.]), tensor([3], dtype=torch.int32))
            >>> pool.num_free_blocks
            2
        """
        compact(self, keep)

    def free(self, rows: Sequence[int] | Tensor) -> None:
        """Empty rows and give up their blocks; a freed row can be appended to again.

        Raises:
            ValueError: on a row outside ``[0, batch_size)`` or one that is already free.
        """
        self._check_not_waiting()
        self._native.free(integers("rows", rows))
        self._mirror.follow()

    def retained_blocks(self, rows: Sequence[int] | Tensor) -> int:
        """How many distinct blocks these rows hold: what a search that keeps them pays.

        Raises:
            ValueError: on a row outside ``[0, batch_size)``.
        """
        return self._native.retained(integers("rows", rows))

    def marginal_blocks(self, kept: Sequence[int] | Tensor | None = None) -> list[int]:
        """Per row, the blocks that it does not share.

        Args:
            kept: rows that stay: a row counts the blocks that keeping it as well would add.
                Default: what freeing the row alone returns to the pool, because no other row of any
                cache holds it (a registered block is returned when it is needed).

        Raises:
            ValueError: on a row outside ``[0, batch_size)``.

        Example:
            >>> import torch
            >>> from torch_winnow.kvcache import BlockPool, PagedKVCache
            >>> pool = BlockPool(8, num_layers=1, num_kv_heads=1, head_dim=2, block_size=4,
            ...                  dtype=torch.float32)
            >>> prompt = PagedKVCache(pool, 1)
            >>> prompt.append(0, torch.ones(1, 1, 8, 2), torch.ones(1, 1, 8, 2))
            >>> tree = prompt.fork([0, 0, 0])
            >>> tree.append(0, *torch.ones(2, 3, 1, 4, 2), lengths=[4, 4, 0])
            >>> tree.retained_blocks([0, 1]), tree.marginal_blocks(), tree.marginal_blocks([0])
            (4, [1, 1, 0], [0, 1, 0])
        """
        return self._native.marginal(None if kept is None else integers("kept", kept))

    def register_prefix(self, token_ids: Sequence[int] | Tensor, *, row: int = 0) -> int:
        """Make the full blocks of a row findable by :meth:`match_prefix`, in any cache of the pool.

        The blocks outlive the row. A pool that runs short gives up those that no row holds, the
        least recently used first, before it is exhausted; a block that is written to is forgotten.

        Args:
            token_ids: what the row holds, from its first token on; those behind the last full
                block are ignored.
            row: of this cache; every layer must have stored the tokens.

        Returns:
            How many tokens can be found now.

        Raises:
            ValueError: on more tokens than a layer has stored, or on a row outside
                ``[0, batch_size)``, and for a block that is registered with other tokens.

        Example:
            >>> import torch
            >>> from torch_winnow.kvcache import BlockPool, PagedKVCache
            >>> pool = BlockPool(8, num_layers=1, num_kv_heads=1, head_dim=2, block_size=4,
            ...                  dtype=torch.float32)
            >>> first, second = PagedKVCache(pool, 1), PagedKVCache(pool, 1)
            >>> first.append(0, torch.ones(1, 1, 10, 2), torch.ones(1, 1, 10, 2))
            >>> first.register_prefix(range(10))
            8
            >>> second.match_prefix([0, 1, 2, 3, 4, 5, 60, 70])
            4
        """
        return self._native.register_prefix(integer("row", row), integers("token_ids", token_ids))

    def match_prefix(self, token_ids: Sequence[int] | Tensor, *, row: int = 0) -> int:
        """Give an empty row the longest run of registered blocks that ``token_ids`` begins with.

        A model needs a token to go on from: pass ``token_ids[:-1]`` where all might be known.

        Args:
            token_ids: of the text that the row is to hold, from its first token on.
            row: of this cache, one without tokens.

        Returns:
            How many tokens the row holds now, in every layer: a multiple of the block size.

        Raises:
            ValueError: on a row that holds tokens, or outside ``[0, batch_size)``.
        """
        self._check_not_waiting()
        matched = self._native.match_prefix(integer("row", row), integers("token_ids", token_ids))
        self._mirror.follow()
        return matched

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        # What copy.copy, copy.deepcopy and pickle ask for.
        raise TypeError(
            "PagedKVCache: a cache owns blocks of its pool and is neither copied nor pickled; "
            "fork(range(batch_size)) gives a cache that continues every row"
        )

    def _copy(self) -> None:
        pages.copy_blocks(self.pool, *self._native.copies())

    def _store(self, layer: int, key: Tensor, value: Tensor, positions: Tensor) -> None:
        pages.store(self.pool, layer, key, value, self._mirror, positions)
        pages.store_bias(self.pool, layer, self._mirror, positions)
        pages.summarise(self.pool, layer, self._mirror, positions)

    def _check_not_waiting(self) -> None:
        if self._waits:
            raise RuntimeError(
                "PagedKVCache: an eviction hook may not change the cache that waits for blocks; "
                "let it free rows of other caches, or catch BlockPoolExhausted around the call"
            )

    def __repr__(self) -> str:
        return f"PagedKVCache({self.pool!r}, batch_size={self.batch_size})"
