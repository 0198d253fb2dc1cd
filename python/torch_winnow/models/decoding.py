"""Generating token by token: what the dense decoder and the CAT share.

A ``Decoding`` holds the sequences of one batch, which grow in lockstep, and their keys and values
in pages. What the rows of the cache mean is the model's business, and stays in the model's file.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor

from torch_winnow.kvcache import BlockPool, PagedKVCache, paged_attention
from torch_winnow.models.layers import Stack, StackConfig

__all__ = ["Decoding", "check_length", "make_pool", "sample"]


def make_pool(
    stack: Stack, batch_size: int, rows: int, *, block_size: int = 64, spare_blocks: int = 0
) -> BlockPool:
    """Pages for ``batch_size`` sequences of at most ``rows`` cache rows, in the model's dtype.

    ``spare_blocks`` leaves room for forks that diverge.
    """
    config: StackConfig = stack.config
    weight = stack.norm.weight
    return BlockPool(
        batch_size * math.ceil(rows / block_size) + spare_blocks,
        num_layers=config.depth,
        num_kv_heads=config.key_value_heads,
        head_dim=config.head_dim,
        block_size=block_size,
        dtype=weight.dtype,
        device=weight.device,
    )


def check_length(prompt: Tensor, num_tokens: int, max_tokens: int) -> int:
    """Tokens in all, or a ``ValueError`` where they are too many."""
    total = prompt.shape[-1] + num_tokens
    if num_tokens < 0 or total > max_tokens:
        raise ValueError(
            f"num_tokens: expected at least 0 and with the prompt's {prompt.shape[-1]} at most "
            f"max_tokens={max_tokens}, got {num_tokens}"
        )
    return total


class Decoding(ABC):
    """Sequences that grow by one token each per ``step``.

    Attributes:
        cache: the paged keys and values. Forking or permuting it directly would leave the model's
            own state behind, so use ``fork_`` and ``permute_``.
        logits: ``(B, V)``, the distribution of the next token of each sequence.
        length: tokens so far, prompt included.
    """

    logits: Tensor

    def __init__(self, stack: Stack, cache: PagedKVCache, length: int, max_tokens: int) -> None:
        self._stack = stack
        self.cache = cache
        self.length = length
        self._max_tokens = max_tokens
        # One view per layer, made once: indexing the pages costs as much as a small op.
        self._pages = list(zip(cache.pool.key_pages, cache.pool.value_pages, strict=True))

    @abstractmethod
    def step(self, tokens: Tensor) -> Tensor:
        """Appends ``tokens (B,)`` and returns the new ``logits``."""

    def fork_(self, parents: Tensor) -> None:
        """Becomes ``len(parents)`` sequences, copies of ``parents`` that share their pages."""
        self.cache = self.cache.fork(parents)
        self._select(parents)

    def permute_(self, ancestors: Tensor) -> None:
        """Sequence i goes on as a copy of ``ancestors[i]``; as many as before, sharing pages."""
        self.cache.permute_(ancestors)
        self._select(ancestors)

    @property
    def cache_bytes(self) -> int:
        """Bytes of keys and values in the blocks that the pool has handed out."""
        pool = self.cache.pool
        pages = pool.key_pages.nbytes + pool.value_pages.nbytes
        return pages * (pool.num_blocks - pool.num_free_blocks) // max(1, pool.num_blocks)

    def _lengthen(self) -> None:
        if self.length == self._max_tokens:
            raise ValueError(f"tokens: the sequences already hold max_tokens={self._max_tokens}")
        self.length += 1

    def _select(self, sequences: Tensor) -> None:
        self.logits = self.logits[sequences]

    def _prefill(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        # All rows are new, so they attend to one another without going through the pages.
        self.cache.append(layer, key, value)
        grouped = query.shape[1] != key.shape[1]
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=grouped)

    def _append(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        cache = self.cache
        cache.append(layer, key, value)
        key_pages, value_pages = self._pages[layer]
        return paged_attention(query, key_pages, value_pages, cache.block_table, cache.seq_lens)


@torch.inference_mode()
def sample(
    decoding: Decoding,
    num_tokens: int,
    *,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draws ``num_tokens`` more tokens for every sequence: ``(B, num_tokens)`` int64.

    ``temperature=0`` takes the most likely token.

    Raises:
        ValueError: if ``num_tokens`` or ``temperature`` is negative.
    """
    if num_tokens < 0:
        raise ValueError(f"num_tokens: expected at least 0, got {num_tokens}")
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature: expected a finite number of at least 0, got {temperature}")
    logits = decoding.logits
    tokens = logits.new_empty((logits.shape[0], num_tokens), dtype=torch.int64)
    for i in range(num_tokens):
        if temperature == 0:
            token = logits.argmax(-1)
        else:
            probability = (logits.float() / temperature).softmax(-1)
            token = probability.multinomial(1, generator=generator)[:, 0]
        tokens[:, i] = token
        if i + 1 < num_tokens:  # the last token needs no row: nothing is predicted from it
            logits = decoding.step(token)
    return tokens
