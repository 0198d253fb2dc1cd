"""Paged key/value caches: storage that forks without copying, attention over all or chosen blocks.

A :class:`BlockPool` owns the memory: pages of ``block_size`` tokens, for all layers. A
:class:`PagedKVCache` owns blocks of a pool, one row of a block table per sequence; rows and caches
that were forked share blocks, and a shared block is copied only when one of its owners writes to
it. Particles, beams, compressed chunks and diffusion blocks can therefore live in one pool.

:func:`paged_attention` reads the pages where they lie, those that rows share once for all of them.
:func:`block_summaries`, :func:`score_blocks` and :func:`select_blocks` choose the blocks that are
worth reading, and :func:`score_select_blocks` does so for a pool that keeps the summaries. Pages
may hold codes of one byte, int8 or float8.

:func:`attention_mass` says what attention each key receives; :func:`h2o_positions`,
:func:`snapkv_positions` and :func:`fastkv_positions` choose by it which tokens stay, for
:meth:`PagedKVCache.compact_`. :func:`merge_similar_` merges similar tokens instead
(:func:`similar_runs`, :func:`merge_runs`). A pool that has too few blocks gives up known prefixes,
asks its eviction hooks and raises :class:`BlockPoolExhausted`.

Everything here serves inference: no gradient flows through a cache.

Example:
    >>> import torch
    >>> from torch_winnow.kvcache import BlockPool, PagedKVCache, paged_attention
    >>> pool = BlockPool(8, num_layers=1, num_kv_heads=2, head_dim=16, dtype=torch.float32)
    >>> cache = PagedKVCache(pool, batch_size=1)
    >>> key, value = torch.randn(2, 1, 2, 5, 16).unbind()
    >>> cache.append(0, key, value)
    >>> beams = cache.fork([0, 0, 0])
    >>> pool.num_free_blocks
    7
    >>> query = torch.randn(3, 4, 1, 16)
    >>> pages = pool.key_pages[0], pool.value_pages[0]
    >>> paged_attention(query, *pages, beams.block_table, beams.seq_lens).shape
    torch.Size([3, 4, 1, 16])
"""

from __future__ import annotations

from torch_winnow._core import BlockPoolExhausted
from torch_winnow._kvcache.attention import paged_attention
from torch_winnow._kvcache.attention_mass import attention_mass
from torch_winnow._kvcache.eviction import fastkv_positions, h2o_positions, snapkv_positions
from torch_winnow._kvcache.merging import merge_runs, merge_similar_, similar_runs
from torch_winnow._kvcache.pool import BlockPool
from torch_winnow._kvcache.selection import (
    block_summaries,
    score_blocks,
    score_select_blocks,
    select_blocks,
)
from torch_winnow._kvcache.storage import PagedKVCache

__all__ = [
    "BlockPool",
    "BlockPoolExhausted",
    "PagedKVCache",
    "attention_mass",
    "block_summaries",
    "fastkv_positions",
    "h2o_positions",
    "merge_runs",
    "merge_similar_",
    "paged_attention",
    "score_blocks",
    "score_select_blocks",
    "select_blocks",
    "similar_runs",
    "snapkv_positions",
]
