"""Pools of pages and the caches that share them; public in :mod:`torch_winnow.kvcache`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn, SupportsIndex

import torch
from torch import Tensor

from torch_winnow import _core
from torch_winnow._fake import check_same_device
from torch_winnow._kvcache.arguments import integer, integers, refuse_gradients

# Bound once: a look-up through torch.ops costs as much as a small op.
_paged_write_ = torch.ops.winnow.paged_write_
_copy_blocks_ = torch.ops.winnow.copy_blocks_

_FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_COPIES, _RESHAPED = 1, 2  # what CacheTable.append reports


def _size(argument: str, value: int) -> int:
    value = integer(argument, value)
    if value < 1:
        raise ValueError(f"{argument}: expected at least 1, got {value}")
    return value


class BlockPool:
    """Memory for keys and values in blocks of ``block_size`` tokens, for any number of caches.

    A block has as many owners as rows of block tables name it, and returns to the pool with the
    last. Calls come from one thread at a time (the interpreter lock is enough).

    Args:
        num_blocks: blocks in the pool. A block holds ``block_size`` tokens for every layer.
        num_layers: layers of the model; one block table serves them all.
        num_kv_heads: key/value heads.
        head_dim: of keys.
        block_size: tokens in a block.
        dtype: float32, bfloat16, float16 or float64.
        device: where the pages lie; this release has the CPU only.
        value_head_dim: of values; ``head_dim`` by default.

    Attributes:
        key_pages: ``(num_layers, num_blocks, num_kv_heads, block_size, head_dim)``.
        value_pages: likewise with ``value_head_dim``.

    Raises:
        ValueError: on a size below 1 (``num_blocks`` may be 0) or that is no integer, on another
            dtype or device.

    Example:
        >>> import torch
        >>> from torch_winnow.kvcache import BlockPool
        >>> pool = BlockPool(4, num_layers=2, num_kv_heads=8, head_dim=64, dtype=torch.bfloat16)
        >>> pool.key_pages.shape, pool.num_free_blocks
        (torch.Size([2, 4, 8, 64, 64]), 4)
    """

    def __init__(
        self,
        num_blocks: int,
        *,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        block_size: int = 64,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        value_head_dim: int | None = None,
    ) -> None:
        num_blocks = integer("num_blocks", num_blocks)
        num_layers = _size("num_layers", num_layers)
        num_kv_heads = _size("num_kv_heads", num_kv_heads)
        head_dim = _size("head_dim", head_dim)
        block_size = _size("block_size", block_size)
        value_head_dim = (
            head_dim if value_head_dim is None else _size("value_head_dim", value_head_dim)
        )
        if dtype not in _FLOATING:
            raise ValueError(f"dtype: expected float32, bfloat16, float16 or float64, got {dtype}")
        if torch.device(device).type != "cpu":
            raise ValueError(
                f"device: expected cpu, where this release's operators run, got {device}"
            )
        self._native = _core.BlockPool(num_blocks)
        self.num_layers = num_layers
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.value_head_dim = value_head_dim
        self.block_size = block_size
        self.dtype = dtype
        # Zeros, so that a padded read of an unused slot is harmless in anybody's kernel.
        shape = (num_layers, num_blocks, num_kv_heads, block_size)
        self.key_pages = torch.zeros(*shape, head_dim, dtype=dtype, device=device)
        self.value_pages = torch.zeros(*shape, value_head_dim, dtype=dtype, device=device)
        self._split()

    def _split(self) -> None:
        self._layers = list(zip(self.key_pages.unbind(), self.value_pages.unbind(), strict=True))

    def grow(self, num_blocks: int) -> None:
        """Enlarge the pool to ``num_blocks``; every cache on it goes on as before.

        The pages move, so ``key_pages`` and ``value_pages`` must be read anew; while one of them is
        copied, both its places are held.

        Raises:
            ValueError: on fewer blocks than there are.
        """
        num_blocks = integer("num_blocks", num_blocks)
        before = self.num_blocks
        if num_blocks < before:
            raise ValueError(f"num_blocks: expected at least {before}, got {num_blocks}")
        # All memory first, so that a want of it changes nothing; it is touched by the copies only.
        larger = [
            pages.new_empty(pages.shape[0], num_blocks, *pages.shape[2:])
            for pages in (self.key_pages, self.value_pages)
        ]
        self._native.grow(num_blocks)
        for name, pages in zip(("key_pages", "value_pages"), larger, strict=True):
            pages[:, :before] = getattr(self, name)
            pages[:, before:] = 0
            setattr(self, name, pages)
        self._split()

    @property
    def device(self) -> torch.device:
        """Where the pages lie."""
        return self.key_pages.device

    @property
    def num_blocks(self) -> int:
        """Blocks in the pool, free or not."""
        return self._native.num_blocks

    @property
    def num_free_blocks(self) -> int:
        """Blocks that nobody owns."""
        return self._native.num_free

    def num_owners(self, block: int) -> int:
        """How many rows of block tables name ``block``; 0 for a free one."""
        return self._native.owners(integer("block", block))

    def __repr__(self) -> str:
        return (
            f"BlockPool({self.num_blocks}, num_layers={self.num_layers}, "
            f"num_kv_heads={self.num_kv_heads}, head_dim={self.head_dim}, "
            f"block_size={self.block_size}, dtype={self.dtype}, "
            f"value_head_dim={self.value_head_dim}; {self.num_free_blocks} free)"
        )


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
        self._seq_lens = torch.zeros(batch_size, dtype=torch.int32)
        self._positions = torch.empty(batch_size, 1, dtype=torch.int64)
        self._positions_address = self._positions.data_ptr()
        # The shapes and dtype that append meets at every token.
        self._heads = pool.num_kv_heads
        self._dims = pool.head_dim, pool.value_head_dim
        self._reserve(native.width)
        self._reshape()

    def _reserve(self, width: int) -> None:
        """Give the native table a tensor of ``width`` columns to keep in step."""
        self._storage = torch.empty(self.batch_size, width, dtype=torch.int32)
        self._native.attach(self._storage.data_ptr(), width, self._seq_lens.data_ptr())

    def _reshape(self) -> None:
        width = self._native.width
        if width > self._storage.shape[1]:
            self._reserve(max(width, 2 * self._storage.shape[1]))
        self._block_table = self._storage[:, :width]

    @property
    def block_table(self) -> Tensor:
        """``(B, max_blocks)`` int32, as wide as the longest row needs, -1 where there is no block.

        The cache keeps writing to it: read it anew after an operation, clone it to keep it, and
        don't write to it (the native table is what counts).
        """
        return self._block_table

    @property
    def seq_lens(self) -> Tensor:
        """``(B,)`` int32: tokens of each row in the furthest layer. Kept up to date in place."""
        return self._seq_lens

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
            key: ``(B, Hkv, T, D)`` in the pool's dtype, last dimension contiguous.
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
        changes = self._native.append(layer, tokens, counts, address)
        if changes:
            if changes & _RESHAPED:
                self._reshape()
            if changes & _COPIES:
                self._copy()
        key_pages, value_pages = self.pool._layers[layer]
        _paged_write_(key_pages, value_pages, key, value, self._block_table, positions)

    def write(self, layer: int, key: Tensor, value: Tensor, positions: Tensor) -> None:
        """Overwrite tokens of one layer in place.

        Args:
            layer: which layer.
            key: ``(B, Hkv, T, D)`` in the pool's dtype, last dimension contiguous.
            value: ``(B, Hkv, T, Dv)``.
            positions: ``(B, T)`` integers, ``0 <= position < seq_lens[b]``, in any order; of equal
                ones the last wins.

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
        if self._native.write(layer, tokens, positions.data_ptr()):
            self._copy()
        key_pages, value_pages = self.pool._layers[layer]
        _paged_write_(key_pages, value_pages, key, value, self._block_table, positions)

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
        self._native.permute(integers("ancestors", ancestors))
        self._reshape()

    def truncate_(self, lengths: Sequence[int] | Tensor) -> None:
        """Drop the tokens from position ``lengths[b]`` on, in every layer.

        Raises:
            ValueError: unless there are ``batch_size`` lengths with ``0 <= length <= seq_lens[b]``.
        """
        self._native.truncate(integers("lengths", lengths))
        self._reshape()

    def free(self, rows: Sequence[int] | Tensor) -> None:
        """Empty rows and give up their blocks; a freed row can be appended to again.

        Raises:
            ValueError: on a row outside ``[0, batch_size)`` or one that is already free.
        """
        self._native.free(integers("rows", rows))
        self._reshape()

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        # What copy.copy, copy.deepcopy and pickle ask for.
        raise TypeError(
            "PagedKVCache: a cache owns blocks of its pool and is neither copied nor pickled; "
            "fork(range(batch_size)) gives a cache that continues every row"
        )

    def _copy(self) -> None:
        sources, targets = self._native.copies()
        pool = self.pool
        _copy_blocks_(
            pool.key_pages, pool.value_pages, torch.tensor(sources), torch.tensor(targets)
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
            if tensor.dtype != self.pool.dtype or tensor.device != self.pool.device:
                raise ValueError(
                    f"{name}: expected {self.pool.dtype} on {self.pool.device} as in the pool, got "
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


@torch.library.register_fake("winnow::paged_write_")
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


@torch.library.register_fake("winnow::copy_blocks_")
def _(key_pages: Tensor, value_pages: Tensor, source: Tensor, target: Tensor) -> None:
    check_same_device(key_pages=key_pages, value_pages=value_pages, source=source, target=target)
