"""The memory of paged caches; public in :mod:`torch_winnow.kvcache`."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, TypeVar

import torch
from torch import Tensor

from torch_winnow import _core
from torch_winnow._kvcache.arguments import integer

if TYPE_CHECKING:
    from torch_winnow._kvcache.storage import PagedKVCache

Result = TypeVar("Result")

_FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_QUANTISED = (torch.int8, torch.float8_e4m3fn)


def _size(argument: str, value: int) -> int:
    value = integer(argument, value)
    if value < 1:
        raise ValueError(f"{argument}: expected at least 1, got {value}")
    return value


def _check_memory(*sizes: int) -> None:
    """What no memory can hold, torch would refuse in words of its own."""
    if math.prod(sizes) >= 2**59:
        raise ValueError(f"num_blocks: expected pages of fewer than 2**59 numbers, got {sizes}")


class BlockPool:
    """Memory for keys and values in blocks of ``block_size`` tokens, for any number of caches.

    A block has as many owners as rows of block tables name it, and returns to the pool with the
    last.

    **Threads.** Several threads may use a pool and different caches on it at the same time. One
    cache may be read by several (``fork``, the counts of blocks, attention), and changed by one
    while nobody else uses it. On a GPU they use one stream, or order theirs themselves.

    Args:
        num_blocks: blocks in the pool. A block holds ``block_size`` tokens for every layer.
        num_layers: layers of the model; one block table serves them all.
        num_kv_heads: key/value heads.
        head_dim: of keys.
        block_size: tokens in a block.
        dtype: float32, bfloat16, float16 or float64; or int8 or float8_e4m3fn, which hold codes of
            one byte and a scale per block and head (``docs/kvcache/quantised.md``).
        device: where the pages lie, ``"cpu"`` or a GPU. The bookkeeping is the host's; tables
            follow it to a GPU without waiting for it.
        value_head_dim: of values; ``head_dim`` by default.
        summaries: keep a summary of every block's keys, ``"minmax"`` or ``"mean"`` as in
            :func:`block_summaries`, up to date with what caches store.
        key_bias: keep a bias for every key, as :func:`paged_attention` adds it, for tokens that
            stand for several (:func:`merge_similar_`).

    Attributes:
        key_pages: ``(num_layers, num_blocks, num_kv_heads, block_size, head_dim)``.
        value_pages: likewise with ``value_head_dim``.
        key_scales: ``(num_layers, num_blocks, num_kv_heads)`` float32, by which the codes of a
            block are multiplied; None where pages are not quantised.
        value_scales: likewise.
        summaries: ``(num_layers, num_blocks, num_kv_heads, 2, head_dim)`` (minimum, maximum) or,
            of means, ``(num_layers, num_blocks, num_kv_heads, head_dim)``, float32 (float64 for
            float64); None without. For the tokens that rows hold they are what
            :func:`block_summaries` would compute. Dropping tokens (``truncate_``) leaves them: a
            minimum and maximum then still bound every key, a mean still counts what was dropped,
            until the block is written to again.
        summary_kind: ``"minmax"``, ``"mean"`` or None.
        key_bias: ``(num_layers, num_blocks, num_kv_heads, block_size)`` float32 (float64 for
            float64), None without; ``append`` and ``write`` store 0.

    Raises:
        ValueError: on a size below 1 (``num_blocks`` may be 0) or that is no integer, on another
            dtype, device or kind of summary.

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
        summaries: Literal["minmax", "mean"] | None = None,
        key_bias: bool = False,
    ) -> None:
        num_blocks = integer("num_blocks", num_blocks)
        num_layers = _size("num_layers", num_layers)
        num_kv_heads = _size("num_kv_heads", num_kv_heads)
        head_dim = _size("head_dim", head_dim)
        block_size = _size("block_size", block_size)
        value_head_dim = (
            head_dim if value_head_dim is None else _size("value_head_dim", value_head_dim)
        )
        if dtype not in _FLOATING + _QUANTISED:
            raise ValueError(
                "dtype: expected float32, bfloat16, float16, float64, int8 or float8_e4m3fn, got "
                f"{dtype}"
            )
        try:
            kind = torch.device(device).type
        except (RuntimeError, TypeError):
            kind = ""
        if kind not in ("cpu", "cuda"):
            raise ValueError(f"device: expected cpu or cuda, got {device}")
        if kind == "cuda" and not torch.cuda.is_available():
            raise ValueError(f"device: torch finds no GPU here: expected cpu, got {device}")
        if summaries not in ("minmax", "mean", None):
            raise ValueError(f"summaries: expected 'minmax', 'mean' or None, got {summaries!r}")
        shape = (num_layers, num_blocks, num_kv_heads, block_size)
        _check_memory(*shape, max(head_dim, value_head_dim))
        self._native = _core.BlockPool(num_blocks)
        # Held from an append's bookkeeping until its tokens are stored: nobody writes to a block
        # that is yet to be copied, nor to pages that move.
        self._lock = threading.RLock()
        self._hooks: list[Callable[[int], object]] = []
        self._evicting = threading.local()
        self.num_layers = num_layers
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.value_head_dim = value_head_dim
        self.block_size = block_size
        self.dtype = dtype
        # Zeros, so that a padded read of an unused slot is harmless in anybody's kernel.
        self.key_pages = torch.zeros(*shape, head_dim, dtype=dtype, device=device)
        self.value_pages = torch.zeros(*shape, value_head_dim, dtype=dtype, device=device)
        self.key_scales: Tensor | None = None
        self.value_scales: Tensor | None = None
        if self.quantised:
            self.key_scales = torch.zeros(*shape[:3], device=device)
            self.value_scales = torch.zeros(*shape[:3], device=device)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        self.summary_kind = summaries
        self.summaries: Tensor | None = None
        if summaries is not None:
            bounds = (2,) if summaries == "minmax" else ()
            self.summaries = torch.zeros(*shape[:3], *bounds, head_dim, dtype=wide, device=device)
        self.key_bias: Tensor | None = None
        if key_bias:
            self.key_bias = torch.zeros(*shape, dtype=wide, device=device)
        self._split()

    @property
    def quantised(self) -> bool:
        """Whether pages hold codes, to be multiplied by scales."""
        return self.dtype in _QUANTISED

    def _pages(self) -> dict[str, Tensor]:
        """Everything that a block owns, ``(num_layers, num_blocks, ...)`` each, by its name."""
        names = ("key_pages", "value_pages", "key_scales", "value_scales", "summaries", "key_bias")
        return {name: pages for name in names if (pages := getattr(self, name)) is not None}

    def _split(self) -> None:
        self._layers = list(zip(self.key_pages.unbind(), self.value_pages.unbind(), strict=True))
        self._scales: list[tuple[Tensor, ...]] = [()] * self.num_layers
        if self.key_scales is not None and self.value_scales is not None:
            self._scales = list(
                zip(self.key_scales.unbind(), self.value_scales.unbind(), strict=True)
            )

    def grow(self, num_blocks: int) -> None:
        """Enlarge the pool to ``num_blocks``; every cache on it goes on as before.

        The pages move, so ``key_pages``, ``value_pages``, ``summaries`` and ``key_bias`` must be
        read anew; while one of them is copied, both its places are held.

        Raises:
            ValueError: on fewer blocks than there are.
        """
        num_blocks = integer("num_blocks", num_blocks)
        with self._lock:
            before = self.num_blocks
            if num_blocks < before:
                raise ValueError(f"num_blocks: expected at least {before}, got {num_blocks}")
            _check_memory(num_blocks, *self.key_pages[:, 0].shape)
            _check_memory(num_blocks, *self.value_pages[:, 0].shape)
            # All memory first, so that a want of it changes nothing; only the copies touch it.
            larger = {
                name: pages.new_empty(pages.shape[0], num_blocks, *pages.shape[2:])
                for name, pages in self._pages().items()
            }
            self._native.grow(num_blocks)
            for name, pages in larger.items():
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

    def add_eviction_hook(self, hook: Callable[[int], object]) -> None:
        """Have ``hook(missing)`` called before an operation fails for want of ``missing`` blocks.

        A hook may free or truncate rows of other caches, drop caches, or :meth:`grow` the pool;
        what it returns does not matter. Hooks run in the order in which they were added, each once,
        until the operation succeeds, which then is as if it had been called after them. If it still
        does not, it raises :class:`BlockPoolExhausted` and has changed nothing. Prefixes that no
        row holds are given up first.

        A hook that raises ends the operation with its error. It may not change the cache whose
        operation waits (a ``RuntimeError``), and where it runs short of blocks itself, no hook is
        called for that. It runs in the thread of the operation, and several threads may be in it at
        once. The pool keeps a reference to it.

        Raises:
            ValueError: if ``hook`` cannot be called.

        Example:
            >>> import torch
            >>> from torch_winnow.kvcache import BlockPool, PagedKVCache
            >>> pool = BlockPool(2, num_layers=1, num_kv_heads=1, head_dim=2, block_size=4,
            ...                  dtype=torch.float32)
            >>> idle, active = PagedKVCache(pool, 1), PagedKVCache(pool, 1)
            >>> tokens = torch.ones(1, 1, 4, 2)
            >>> idle.append(0, tokens, tokens)
            >>> pool.add_eviction_hook(lambda missing: idle.free([0]))
            >>> for _ in range(2):
            ...     active.append(0, tokens, tokens)
            >>> idle.seq_lens, active.seq_lens
            (tensor([0], dtype=torch.int32), tensor([8], dtype=torch.int32))
        """
        if not callable(hook):
            raise ValueError(f"hook: expected a function of a number of blocks, got {hook!r}")
        self._hooks.append(hook)

    def remove_eviction_hook(self, hook: Callable[[int], object]) -> None:
        """Forget a hook.

        Raises:
            ValueError: if it was not added.
        """
        if hook not in self._hooks:
            raise ValueError(f"hook: expected one that was added, got {hook!r}")
        self._hooks.remove(hook)

    def _with_room(
        self, cache: PagedKVCache, operation: Callable[..., Result], *arguments: object
    ) -> Result:
        """Calls an operation of a cache with the lock held; hooks run without it."""
        try:
            return operation(*arguments)
        except _core.BlockPoolExhausted as error:
            if not self._hooks or getattr(self._evicting, "now", False):
                raise
            missing = error.needed - error.free
        hooks = list(self._hooks)
        while True:
            hook = hooks.pop(0)
            self._lock.release()
            self._evicting.now = cache._waits = True
            try:
                hook(missing)
            finally:
                self._evicting.now = cache._waits = False
                self._lock.acquire()
            try:
                return operation(*arguments)
            except _core.BlockPoolExhausted as error:
                if not hooks:
                    raise
                missing = error.needed - error.free

    @property
    def num_free_blocks(self) -> int:
        """Blocks that nobody owns."""
        return self._native.num_free

    @property
    def num_evictable_blocks(self) -> int:
        """Blocks that nothing but :meth:`PagedKVCache.register_prefix` keeps: free when needed."""
        return self._native.num_evictable

    def num_owners(self, block: int) -> int:
        """How many rows of block tables name ``block``, one more if it is registered; 0: free.

        Raises:
            ValueError: on a block that the pool does not have.
        """
        return self._native.owners(integer("block", block))

    def __repr__(self) -> str:
        return (
            f"BlockPool({self.num_blocks}, num_layers={self.num_layers}, "
            f"num_kv_heads={self.num_kv_heads}, head_dim={self.head_dim}, "
            f"block_size={self.block_size}, dtype={self.dtype}, "
            f"value_head_dim={self.value_head_dim}, summaries={self.summary_kind!r}, "
            f"key_bias={self.key_bias is not None}; "
            f"{self.num_free_blocks} free)"
        )
