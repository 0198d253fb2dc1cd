"""Generating token by token: what the dense decoder and the CAT share.

A ``Decoding`` holds the sequences of one batch and their keys and values in pages. They may differ
in length; a step adds one token to every one of them, ``extend`` several in one pass, of which
``truncate_`` takes back what turns out wrong. What the rows of the cache mean is the model's
business, and stays in the model's file.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from torch_winnow.kvcache import BlockPool, PagedKVCache, paged_attention
from torch_winnow.models.layers import Stack, StackConfig

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = [
    "Decoding",
    "check_length",
    "check_lengths",
    "check_sampling",
    "draw",
    "fork_blocks",
    "make_pool",
    "sample",
]


_BLOCK_ROWS = 64


def make_pool(
    stack: Stack, batch_size: int, rows: int, *, fork_blocks: int = 0, spare_blocks: int = 0
) -> BlockPool:
    """Pages for ``batch_size`` sequences of at most ``rows`` cache rows, in the model's dtype.

    ``fork_blocks`` per sequence and ``spare_blocks`` in all leave room for forks that diverge.
    """
    config: StackConfig = stack.config
    weight = stack.norm.weight
    return BlockPool(
        batch_size * (math.ceil(rows / _BLOCK_ROWS) + fork_blocks) + spare_blocks,
        num_layers=config.depth,
        num_kv_heads=config.key_value_heads,
        head_dim=config.head_dim,
        block_size=_BLOCK_ROWS,
        dtype=weight.dtype,
        device=weight.device,
    )


def fork_blocks(rows: int) -> int:
    """Blocks that a fork may need for itself when it adds ``rows`` cache rows."""
    return math.ceil((_BLOCK_ROWS - 1 + rows) / _BLOCK_ROWS) if rows else 0


def check_length(prompt: Tensor, num_tokens: int, max_tokens: int) -> int:
    """Tokens in all, or a ``ValueError`` where they are too many."""
    total = prompt.shape[-1] + num_tokens
    if num_tokens < 0 or total > max_tokens:
        raise ValueError(
            f"num_tokens: expected at least 0 and with the prompt's {prompt.shape[-1]} at most "
            f"max_tokens={max_tokens}, got {num_tokens}"
        )
    return total


def check_lengths(
    lengths: Sequence[int] | Tensor | None, prompt: Tensor, name: str = "lengths"
) -> Tensor:
    """How many tokens of each row count, as ``(B,)`` int64 on the CPU; all of them where None."""
    batch, longest = prompt.shape
    if lengths is None:
        return torch.full((batch,), longest)
    result = _one_per_sequence(name, lengths, batch)
    if batch and not 0 <= int(result.min()) <= int(result.max()) <= longest:
        raise ValueError(
            f"{name}: expected 0 to {longest}, the tokens of a row, got {result.tolist()}"
        )
    return result


def _one_per_sequence(name: str, values: Sequence[int] | Tensor, batch: int) -> Tensor:
    """``(B,)`` int64 on the CPU."""
    result = torch.as_tensor(values, device="cpu")
    if result.shape != (batch,) or (batch and result.is_floating_point()):
        raise ValueError(
            f"{name}: expected ({batch},) integers, one per sequence, got {tuple(result.shape)} "
            f"{result.dtype}"
        )
    return result.long()


def _check_ids(tokens: Tensor, shape: tuple[int, ...], expected: str) -> None:
    if tokens.shape != shape or tokens.is_floating_point():
        raise ValueError(
            f"tokens: expected {expected} integer token ids, got {tuple(tokens.shape)} "
            f"{tokens.dtype}"
        )


class Decoding(ABC):
    """Sequences that grow, by one token each per ``step`` or by several per ``extend``.

    Attributes:
        cache: the paged keys and values. Forking or permuting it directly would leave the model's
            own state behind, so use ``fork``, ``fork_`` and ``permute_``.
        logits: ``(B, V)``, the distribution of the next token of each sequence.
        lengths: ``(B,)`` int64 on the CPU, tokens of each sequence so far, prompt included.
    """

    logits: Tensor

    def __init__(self, stack: Stack, cache: PagedKVCache, lengths: Tensor, max_tokens: int) -> None:
        self._stack = stack
        self.cache = cache
        self.lengths = lengths
        self._max_tokens = max_tokens
        self._extension: _Extension | None = None
        # One view per layer, made once: indexing the pages costs as much as a small op.
        self._pages = list(zip(cache.pool.key_pages, cache.pool.value_pages, strict=True))

    @torch.inference_mode()
    def step(self, tokens: Tensor) -> Tensor:
        """Appends ``tokens (B,)`` and returns the new ``logits``.

        A step that raises, for want of pages too, has appended nothing.

        Raises:
            ValueError: on tokens that are not ``(B,)`` integers, or a sequence that would become
                longer than ``max_tokens``.
        """
        _check_ids(tokens, (len(self.lengths),), f"({len(self.lengths)},)")
        self._settle(1)
        self.logits = self._step(tokens.long())
        self.lengths = self.lengths + 1
        return self.logits

    @torch.inference_mode()
    def extend(self, tokens: Tensor, counts: Sequence[int] | Tensor | None = None) -> Tensor:
        """Appends ``tokens (B, T)`` in one pass; the same as T steps, up to rounding.

        Of sequence b the first ``counts[b]`` count, all of them by default. Until something else is
        appended, forked or permuted, :meth:`truncate_` can take them back.

        Returns:
            Logits ``(B, T, V)``: index t is the distribution of the token after ``tokens[:, t]``.
            Rows after the first ``counts[b]`` repeat the last of them.

        Raises:
            ValueError: on tokens that are not ``(B, T)`` integers, counts outside [0, T], or a
                sequence that would become longer than ``max_tokens``.
        """
        batch = len(self.lengths)
        _check_ids(tokens, (batch, *tokens.shape[1:2]), f"({batch}, T)")
        number = check_lengths(counts, tokens, "counts")
        if not number.any():
            return self.logits.unsqueeze(1).repeat(1, tokens.shape[1], 1)
        before, first = self.lengths, self.logits
        self._settle(number)
        # What does not count may be anything, -1 too.
        own = torch.arange(tokens.shape[1]) < number[:, None]
        after = self._append(torch.where(own.to(tokens.device), tokens, 0).long(), number)
        if counts is not None:
            index = torch.arange(tokens.shape[1]).minimum(number[:, None] - 1).clamp(min=0)
            after = after[torch.arange(batch)[:, None], index]
            after[number == 0] = first[number == 0].unsqueeze(1)
        self._extension = _Extension(before, first, after)
        self.lengths = before + number
        self.logits = self._extension.logits_at(self.lengths)
        return after

    @torch.inference_mode()
    def truncate_(self, lengths: Sequence[int] | Tensor) -> None:
        """Takes back tokens of the last :meth:`extend`: sequence b keeps ``lengths[b]`` tokens.

        Raises:
            ValueError: unless every length lies between those before and after that call.
        """
        extension = self._extension
        least = self.lengths if extension is None else extension.before
        wanted = _one_per_sequence("lengths", lengths, len(least))
        if ((wanted < least) | (wanted > self.lengths)).any():
            raise ValueError(
                f"lengths: only what the last extend appended can be taken back: expected at least "
                f"{least.tolist()} and at most {self.lengths.tolist()}, got {wanted.tolist()}"
            )
        if extension is not None:
            self._truncate(wanted)
            self.logits = extension.logits_at(wanted)
            self.lengths = wanted
            self._settle(0)

    def fork(self, parents: Sequence[int] | Tensor) -> Self:
        """``len(parents)`` new sequences, copies of ``parents`` that share their pages."""
        child = copy.copy(self)
        child.fork_(parents)
        return child

    def fork_(self, parents: Sequence[int] | Tensor) -> None:
        """Becomes ``len(parents)`` sequences, copies of ``parents`` that share their pages."""
        cache = self.cache.fork(parents)
        self._settle(0)
        self.cache = cache
        self._select(torch.as_tensor(parents, dtype=torch.int64))

    def permute_(self, ancestors: Sequence[int] | Tensor) -> None:
        """Sequence i goes on as a copy of ``ancestors[i]``; as many as before, sharing pages."""
        self.cache.permute_(ancestors)
        self._settle(0)
        self._select(torch.as_tensor(ancestors, dtype=torch.int64))

    @property
    def cache_bytes(self) -> int:
        """Bytes of keys and values in the blocks that the pool has handed out."""
        pool = self.cache.pool
        pages = pool.key_pages.nbytes + pool.value_pages.nbytes
        return pages * (pool.num_blocks - pool.num_free_blocks) // max(1, pool.num_blocks)

    @abstractmethod
    def _step(self, tokens: Tensor) -> Tensor:
        """Stores one token of each sequence; logits ``(B, V)`` after it."""

    @abstractmethod
    def _append(self, tokens: Tensor, counts: Tensor) -> Tensor:
        """Stores the first ``counts[b]`` tokens of each row; logits ``(B, T, V)`` after each."""

    @abstractmethod
    def _truncate(self, lengths: Tensor) -> None:
        """Shortens the cache, and what else the model keeps, to ``lengths``."""

    def _settle(self, counts: Tensor | int) -> None:
        """Keeps what the last extend appended, and makes sure that ``counts`` more tokens fit."""
        if (self.lengths + counts > self._max_tokens).any():
            raise ValueError(
                f"tokens: expected at most max_tokens={self._max_tokens} in a sequence, got "
                f"{int((self.lengths + counts).max())}"
            )
        self._extension = None

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

        return last(self._stack(rows, positions, attend), counts)

    def _extend(self, rows: Tensor, positions: Tensor, counts: Tensor | None = None) -> Tensor:
        """Hidden states of ``rows (B, T, width)`` that are appended to the cache.

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

        return self._stack(rows, positions, attend)  # type: ignore[no-any-return]


class _Extension(NamedTuple):
    """What the last ``extend`` started from and found: lengths, logits before, logits after."""

    before: Tensor
    first: Tensor
    after: Tensor

    def logits_at(self, lengths: Tensor) -> Tensor:
        kept = lengths - self.before
        logits = self.after[torch.arange(len(kept)), (kept - 1).clamp(min=0)]
        return torch.where((kept > 0).to(logits.device)[:, None], logits, self.first)


def _take(x: Tensor, index: Tensor) -> Tensor:
    """Rows ``index (B, T)`` of ``x (B, H, T, D)``."""
    index = index.to(x.device)[:, None, :, None]
    return x.gather(2, index.expand(-1, x.shape[1], -1, x.shape[3]))


def last(hidden: Tensor, counts: Tensor | None) -> Tensor:
    """Each sequence's last of its ``counts`` rows."""
    if counts is None:
        return hidden[:, -1]
    return hidden[torch.arange(len(counts)), counts - 1]


def draw(logits: Tensor, temperature: float, generator: torch.Generator | None) -> Tensor:
    """One token ``(B,)`` from each row of logits; the most likely one at temperature 0."""
    if temperature == 0:
        return logits.argmax(-1)
    probability = (logits.float() / temperature).softmax(-1)
    return probability.multinomial(1, generator=generator)[:, 0]


def check_sampling(num_tokens: int, temperature: float, draft_tokens: int = 1) -> None:
    if num_tokens < 0:
        raise ValueError(f"num_tokens: expected at least 0, got {num_tokens}")
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature: expected a finite number of at least 0, got {temperature}")
    if draft_tokens < 1:
        raise ValueError(f"draft_tokens: expected at least 1, got {draft_tokens}")


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
    check_sampling(num_tokens, temperature)
    logits = decoding.logits
    tokens = logits.new_empty((logits.shape[0], num_tokens), dtype=torch.int64)
    for i in range(num_tokens):
        token = draw(logits, temperature, generator)
        tokens[:, i] = token
        if i + 1 < num_tokens:  # the last token needs no row: nothing is predicted from it
            logits = decoding.step(token)
    return tokens
