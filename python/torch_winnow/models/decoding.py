"""Generating token by token: what the dense decoder and the CAT share.

A ``Decoding`` holds the sequences of one batch and their keys and values in pages. They may differ
in length; each step adds one token to every one of them. What the rows of the cache mean is the
model's business, and stays in the model's file.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from torch_winnow.kvcache import BlockPool, PagedKVCache, paged_attention
from torch_winnow.models.layers import Stack, StackConfig

__all__ = ["Decoding", "check_length", "check_lengths", "make_pool", "sample"]


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


def check_lengths(lengths: Sequence[int] | Tensor | None, prompt: Tensor) -> Tensor:
    """Tokens of each prompt as ``(B,)`` int64 on the CPU; all of them where None."""
    batch, longest = prompt.shape
    if lengths is None:
        return torch.full((batch,), longest)
    result = torch.as_tensor(lengths, device="cpu")
    if result.is_floating_point() or result.shape != (batch,):
        raise ValueError(
            f"lengths: expected ({batch},) integers, one per prompt, got {tuple(result.shape)} "
            f"{result.dtype}"
        )
    if batch and not 0 <= int(result.min()) <= int(result.max()) <= longest:
        raise ValueError(
            f"lengths: expected 0 to {longest}, the prompts' width, got {result.tolist()}"
        )
    return result.long()


class Decoding(ABC):
    """Sequences that grow by one token each per ``step``.

    Attributes:
        cache: the paged keys and values. Forking or permuting it directly would leave the model's
            own state behind, so use ``fork_`` and ``permute_``.
        logits: ``(B, V)``, the distribution of the next token of each sequence.
        lengths: ``(B,)`` int64 on the CPU, tokens of each sequence so far, prompt included.
    """

    logits: Tensor

    def __init__(self, stack: Stack, cache: PagedKVCache, lengths: Tensor, max_tokens: int) -> None:
        self._stack = stack
        self.cache = cache
        self.lengths = lengths
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
        if (self.lengths == self._max_tokens).any():
            raise ValueError(f"tokens: a sequence already holds max_tokens={self._max_tokens}")
        self.lengths = self.lengths + 1

    def _select(self, sequences: Tensor) -> None:
        self.logits = self.logits[sequences]
        self.lengths = self.lengths[sequences]

    def _prefill(self, rows: Tensor, positions: Tensor, counts: Tensor) -> Tensor:
        """The last hidden state of each sequence; its first ``counts[b]`` rows are its own."""

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            # All rows are new, so they attend to one another without going through the pages.
            self.cache.append(layer, key, value, lengths=counts)
            grouped = query.shape[1] != key.shape[1]
            return F.scaled_dot_product_attention(
                query, key, value, is_causal=True, enable_gqa=grouped
            )

        return _last(self._stack(rows, positions, attend), counts)

    def _extend(self, rows: Tensor, positions: Tensor, counts: Tensor | None = None) -> Tensor:
        """The last hidden state of each sequence after ``rows (B, T, width)`` more.

        Of sequence b the first ``counts[b]`` rows count, all of them by default.
        """
        cache, count = self.cache, rows.shape[1]
        # paged_attention takes the last T positions of a sequence: shorter ones move to the right.
        shift = None if counts is None else count - counts
        column = torch.arange(count)

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            cache.append(layer, key, value, lengths=counts)
            if shift is not None:
                query = _take(query, (column - shift[:, None]).clamp(min=0))
            key_pages, value_pages = self._pages[layer]
            out = paged_attention(query, key_pages, value_pages, cache.block_table, cache.seq_lens)
            if shift is not None:
                out = _take(out, (column + shift[:, None]).clamp(max=count - 1))
            return out

        hidden = self._stack(rows, positions, attend)
        return hidden[:, -1] if counts is None else _last(hidden, counts)


def _take(x: Tensor, index: Tensor) -> Tensor:
    """Rows ``index (B, T)`` of ``x (B, H, T, D)``."""
    return x.gather(2, index[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))


def _last(hidden: Tensor, counts: Tensor) -> Tensor:
    return hidden[torch.arange(len(counts)), counts - 1]


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
