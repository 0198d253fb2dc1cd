"""The caches that live in a pool of pages; public in :mod:`torch_winnow.kvcache`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn, SupportsIndex

import torch
from torch import Tensor

from torch_winnow import _core
from torch_winnow._kvcache import pages
from torch_winnow._kvcache.arguments import integer, integers, refuse_gradients
from torch_winnow._kvcache.compaction import compact
from torch_winnow._kvcache.mirror import TableMirror, sent
from torch_winnow._kvcache.pool import BlockPool

# What CacheTable.append reports.
_COPIES, _RESHAPED, _FRESH, _MOVED = 1, 2, 4, 8
_TO_QUANTISE = (torch.float32, torch.bfloat16, torch.float16)


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
        self._mirror = TableMirror(native, batch_size, pool.device)
        # What an append has to follow: on the CPU lengths and table are the native table's own.
        self._followed = _RESHAPED | _MOVED if self._mirror.is_apart else _RESHAPED
        self._positions = torch.empty(batch_size, 1, dtype=torch.int64)
        self._positions_address = self._positions.data_ptr()
        # The shapes and dtype that append meets at every token.
        self._heads = pool.num_kv_heads
        self._dims = pool.head_dim, pool.value_head_dim

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
        self._check(key, value)
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
        self._check(key, value)
        tokens = key.shape[2]
        if not isinstance(positions, Tensor):
            raise ValueError(
                f"positions: expected a ({self.batch_size}, {tokens}) int32 or int64 tensor, got "
                f"{positions!r} ({type(positions).__name__})"
            )
        if positions.shape != (self.batch_size, tokens) or positions.dtype not in (
            torch.int32,
            torch.int64,
        ):
            raise ValueError(
                f"positions: expected ({self.batch_size}, {tokens}) int32 or int64, got "
                f"{tuple(positions.shape)} of {positions.dtype}"
            )
        positions = positions.to(device="cpu", dtype=torch.int64).contiguous()
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

    def _claim(self, positions: Tensor) -> None:
        """Make the blocks of positions, -1 for none, this cache's, with all that they hold.

        Called with the pool's lock, which is held until the tokens are stored.
        """
        self._check_not_waiting()
        arguments = 0, positions.shape[1], positions.data_ptr(), True
        if self.pool._with_room(self, self._native.write, *arguments):
            self._mirror.follow()
            self._copy()

    def _begun(self, positions: Tensor) -> Tensor:
        """The blocks whose first slot is at one of ``positions``: 0, 1, ... in order, or -1."""
        table = self.block_table
        firsts = positions[:, :: self.pool.block_size][:, : table.shape[1]] >= 0
        return table[:, : firsts.shape[1]][sent(firsts, self.pool.device)]

    def _written(self, positions: Tensor) -> None:
        """Tell autograd and the summaries of all layers what has been stored."""
        pages.mark_written(self.pool.key_pages, self.pool.value_pages)
        for layer in range(self.pool.num_layers):
            pages.summarise(self.pool, layer, self._mirror, positions)

    def _check_not_waiting(self) -> None:
        if self._waits:
            raise RuntimeError(
                "PagedKVCache: an eviction hook may not change the cache that waits for blocks; "
                "let it free rows of other caches, or catch BlockPoolExhausted around the call"
            )

    def _check(self, key: Tensor, value: Tensor) -> None:
        """Everything that the store could refuse, before anything is changed."""
        for name, tensor in (("key", key), ("value", value)):
            if not isinstance(tensor, Tensor):
                raise ValueError(f"{name}: expected a tensor, got {tensor!r}")
        tokens = key.shape[2] if key.dim() == 4 else 0
        for name, tensor, dim in (("key", key, self._dims[0]), ("value", value, self._dims[1])):
            if tensor.shape != (self.batch_size, self._heads, tokens, dim):
                raise ValueError(
                    f"{name}: expected (B, Hkv, T, D) = ({self.batch_size}, {self._heads}, "
                    f"{tokens if name == 'value' else 'T'}, {dim}), got {tuple(tensor.shape)}"
                )
            dtypes = _TO_QUANTISE if self.pool.quantised else (self.pool.dtype,)
            if tensor.dtype not in dtypes or tensor.device != self.pool.device:
                expected = " or ".join(map(str, dtypes))
                raise ValueError(
                    f"{name}: expected {expected} on {self.pool.device} as in the pool, got "
                    f"{tensor.dtype} on {tensor.device}"
                )
            if dim > 1 and tensor.stride(3) != 1 and tensor.numel() > 0:
                raise ValueError(
                    f"{name}: the last dimension must be contiguous (stride 1), got stride "
                    f"{tensor.stride(3)}"
                )
        refuse_gradients(key=key, value=value)

    def __repr__(self) -> str:
        return f"PagedKVCache({self.pool!r}, batch_size={self.batch_size})"
