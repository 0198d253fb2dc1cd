"""The Compress & Attend Transformer (CAT), arXiv 2511.05313.

A sequence is cut into chunks of C tokens. A bidirectional *compressor* maps every chunk to one
vector; a causal *decoder* decodes a chunk from the vectors of all earlier chunks and its own tokens
so far. So N tokens of context cost N/C + C rows of cache instead of N. One set of weights serves
several chunk sizes; which one is chosen at every call, trading speed against quality.

Rows of the decoder. Block n is ``[vector n, separator, tokens of chunk n]``: vector 0 is a learned
dummy, one per chunk size, and vector n is the compression of chunk n - 1, so a token never sees its
own chunk's vector. The separator is one learned row per chunk size (adaptive models;
``separator=False`` is the layout of fixed-size ones). In the paper a row's rotary position is its
offset in the block: the place of a chunk reaches the decoder through the compressor alone, which
reads it from a prefix row, and which vector is the latest has to be learned. With
``positions="sequence"`` a row's position is its place among all rows, and attention knows it from
the start; short trainings want that.

The chunk's last token needs no row of its own: the next token is the first of a new chunk and is
predicted from that chunk's vector and separator, and nothing else could see the row. Leaving it out
changes no logit, and saves a row per chunk in training and a decoder call per chunk in generation.
The block length is therefore ``C + 1`` with a separator, ``C`` without.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torch_winnow.attention import block_diagonal_attention, cat_attention
from torch_winnow.kvcache import BlockPool, PagedKVCache
from torch_winnow.models.decoding import (
    check_length,
    check_lengths,
    check_sampling,
    fork_blocks,
    make_pool,
    sample,
)
from torch_winnow.models.layers import Stack, StackConfig, check_tokens

if TYPE_CHECKING:
    from torch_winnow.models.cat_decoding import CATDecoding

__all__ = ["CATConfig", "Compressor", "CompressAttendTransformer"]


@dataclass(frozen=True)
class CATConfig:
    """Shape of a :class:`CompressAttendTransformer`.

    Attributes:
        decoder: the causal layers.
        compressor: the bidirectional layers, usually fewer and no wider.
        chunk_sizes: the sizes that a call may choose from.
        separator: whether a learned row per chunk size follows each vector.
        positions: of the decoder's rows, "block" (the offset in the block, the paper's) or
            "sequence" (the place among all rows).
        projection: how one projection serves chunks below the largest size: "last" takes its last
            places, so that the tokens just before a chunk's end are read alike at every size;
            "interpolated" stretches it, as the paper does.
        vocab_size: number of token ids.
        max_tokens: longest sequence.
    """

    decoder: StackConfig = field(default_factory=lambda: StackConfig(width=192, depth=4, heads=3))
    compressor: StackConfig = field(
        default_factory=lambda: StackConfig(width=128, depth=2, heads=2)
    )
    chunk_sizes: tuple[int, ...] = (4, 8, 16, 32)
    separator: bool = True
    positions: Literal["block", "sequence"] = "block"
    projection: Literal["last", "interpolated"] = "last"
    vocab_size: int = 256
    max_tokens: int = 4096

    def __post_init__(self) -> None:
        sizes = self.chunk_sizes
        if not sizes or min(sizes) < 1 or len(set(sizes)) != len(sizes):
            raise ValueError(f"chunk_sizes: expected distinct positive sizes, got {sizes}")
        if self.positions not in ("block", "sequence"):
            raise ValueError(f'positions: expected "block" or "sequence", got {self.positions!r}')
        if self.projection not in ("last", "interpolated"):
            raise ValueError(
                f'projection: expected "last" or "interpolated", got {self.projection!r}'
            )

    @property
    def prefix_rows(self) -> int:
        """Rows before a chunk in the compressor: the chunk size's marker, if there are several
        sizes, and the chunk's place."""
        return 2 if len(self.chunk_sizes) > 1 else 1

    @property
    def leading_rows(self) -> int:
        """Rows of a block before its tokens."""
        return 2 if self.separator else 1

    def block_rows(self, chunk_size: int) -> int:
        """Rows of a block: those before its tokens, and all of its tokens but the last."""
        return self.leading_rows + chunk_size - 1

    def block_start(self, block: int, chunk_size: int) -> int:
        """Rotary position of a block's first row."""
        return block * self.block_rows(chunk_size) if self.positions == "sequence" else 0

    @property
    def rotary_positions(self) -> int:
        """How many rotary positions there are."""
        return max(
            self.block_start(self.max_tokens // size, size) + self.block_rows(size)
            for size in self.chunk_sizes
        )


class Compressor(nn.Module):
    """Maps chunks of C tokens to one vector each; a chunk sees itself and its prefix alone."""

    def __init__(self, config: CATConfig) -> None:
        super().__init__()
        self.config = config
        width = config.compressor.width
        max_chunks = math.ceil(config.max_tokens / min(config.chunk_sizes))
        self.embedding = nn.Embedding(config.vocab_size, width)
        sizes = len(config.chunk_sizes)
        self.size_rows = nn.Parameter(torch.randn(sizes, width)) if sizes > 1 else None
        # Waves of many lengths, not noise: neighbours start alike, so that recency can be read from
        # them before training has seen every place many times.
        self.position_rows = nn.Parameter(_waves(max_chunks, width))
        self.stack = Stack(config.compressor, config.prefix_rows + max(config.chunk_sizes))
        self.projection = nn.Linear(
            max(config.chunk_sizes) * width, config.decoder.width, bias=False
        )
        nn.init.normal_(self.projection.weight, std=self.projection.in_features**-0.5)

    def forward(self, chunks: Tensor, places: Tensor | None = None) -> Tensor:
        """Vectors ``(B, K, decoder width)`` of tokens ``(B, K, C)``.

        ``places (B, K)`` are those of the chunks in their sequences, by default 0 to K - 1.
        """
        batch, count, size = chunks.shape
        lead, width = self.config.prefix_rows, self.config.compressor.width
        block = lead + size
        place = self.position_rows[:count] if places is None else self.position_rows[places]
        prefix = place.unsqueeze(-2)
        if self.size_rows is not None:
            marker = self.size_rows[self.config.chunk_sizes.index(size)]
            prefix = torch.stack((marker.expand_as(place), place), dim=-2)
        rows = torch.cat((prefix.expand(batch, count, lead, width), self.embedding(chunks)), dim=2)
        positions = torch.arange(block, device=chunks.device).repeat(count)

        def within_block(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return block_diagonal_attention(query, key, value, block_size=block)

        hidden = self.stack(rows.flatten(1, 2), positions, within_block)
        return self._project(hidden.view(batch, count, block, width)[:, :, lead:].flatten(2))

    def _project(self, chunks: Tensor) -> Tensor:
        """One vector per chunk of features ``(B, K, C * width)``."""
        weight, features = self.projection.weight, chunks.shape[-1]
        if self.config.projection == "interpolated":
            if features < weight.shape[1]:
                size = (weight.shape[0], features)
                weight = F.interpolate(weight[None, None], size=size, mode="bilinear")[0, 0]
            return F.linear(chunks, weight)
        # The root gives the vectors of all sizes one magnitude.
        scale = math.sqrt(weight.shape[1] / features)
        return scale * F.linear(chunks, weight[:, -features:])


class CompressAttendTransformer(nn.Module):
    """One set of weights that decodes with any of its chunk sizes.

    Example:
        >>> import torch
        >>> from torch_winnow.models import CATConfig, CompressAttendTransformer, StackConfig
        >>> small = StackConfig(width=32, depth=1, heads=2)
        >>> model = CompressAttendTransformer(CATConfig(small, small, chunk_sizes=(4, 8)))
        >>> model(torch.randint(256, (2, 21)), chunk_size=8).shape
        torch.Size([2, 21, 256])
        >>> model.generate(torch.randint(256, (2, 21)), 5, chunk_size=4).shape
        torch.Size([2, 5])
    """

    def __init__(self, config: CATConfig) -> None:
        super().__init__()
        self.config = config
        width = config.decoder.width
        self.compressor = Compressor(config)
        self.embedding = nn.Embedding(config.vocab_size, width)
        self.dummy_vectors = nn.Parameter(torch.randn(len(config.chunk_sizes), width))
        self.separators = (
            nn.Parameter(torch.randn(len(config.chunk_sizes), width)) if config.separator else None
        )
        self.stack = Stack(config.decoder, config.rotary_positions)
        self.head = nn.Linear(width, config.vocab_size, bias=False)
        nn.init.normal_(self.head.weight, std=0.1 * width**-0.5)

    def forward(self, tokens: Tensor, *, chunk_size: int) -> Tensor:
        """Logits ``(B, N, V)`` of tokens ``(B, N)``: index t is the distribution of token t.

        Raises:
            ValueError: if ``tokens`` is not ``(B, N)`` ids below ``vocab_size``, N is above
                ``max_tokens``, or ``chunk_size`` is not one of the configuration's.
        """
        tokens = self._check(tokens, chunk_size)
        batch, length = tokens.shape
        count = math.ceil(length / chunk_size)
        padding = count * chunk_size - length  # after every row that is read: it changes nothing
        chunks = F.pad(tokens, (0, padding)).view(batch, count, chunk_size)
        lead, block = self.config.leading_rows, self.config.block_rows(chunk_size)
        vectors = self.vectors(chunks[:, :-1]).unsqueeze(2)[:, :count]
        rows = [vectors, self.embedding(chunks[:, :, :-1])]
        if self.separators is not None:
            separator = self.separator(chunk_size)
            rows.insert(1, separator.expand(batch, count, 1, -1))
        positions = self._positions(torch.arange(count * block, device=tokens.device), block)

        def interleaved(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return cat_attention(query, key, value, block_size=block)

        hidden = self.stack(torch.cat(rows, dim=2).flatten(1, 2), positions, interleaved)
        hidden = hidden.unflatten(1, (count, block))[:, :, lead - 1 :].flatten(1, 2)
        return self.head(hidden[:, :length])  # type: ignore[no-any-return]

    def cache_rows(self, max_tokens: int, chunk_size: int) -> int:
        """Most cache rows that a sequence of ``max_tokens`` holds at once."""
        return max_tokens // chunk_size + self.config.block_rows(chunk_size)

    def block_pool(
        self,
        batch_size: int,
        max_tokens: int,
        *,
        chunk_size: int,
        draft_tokens: int = 0,
        spare_blocks: int = 0,
    ) -> BlockPool:
        """Pages for ``batch_size`` sequences of up to ``max_tokens`` tokens.

        With ``draft_tokens`` so many tokens fit in one ``extend``, or in a fork of each sequence.
        """
        self._check_size(chunk_size)
        turns = math.ceil(draft_tokens / chunk_size)  # at most so many forks, each a chunk further
        forked = fork_blocks(turns and turns + self.config.block_rows(chunk_size))
        return make_pool(
            self.stack,
            batch_size,
            self.cache_rows(max_tokens, chunk_size),
            fork_blocks=turns * forked,
            spare_blocks=spare_blocks,
        )

    @torch.inference_mode()
    def start(
        self,
        prompt: Tensor,
        pool: BlockPool,
        *,
        chunk_size: int,
        lengths: Sequence[int] | Tensor | None = None,
    ) -> CATDecoding:
        """Reads ``prompt (B, N)`` (N may be 0) and returns the sequences, ready to grow.

        Of prompt b the first ``lengths[b]`` tokens count, by default all: sequences may stand at
        different places of their chunks.
        """
        from torch_winnow.models.cat_decoding import CATDecoding

        prompt = self._check(prompt, chunk_size, "prompt")
        cache = PagedKVCache(pool, prompt.shape[0])
        return CATDecoding(self, prompt, check_lengths(lengths, prompt), cache, chunk_size)

    def generate(
        self,
        prompt: Tensor,
        num_tokens: int,
        *,
        chunk_size: int,
        lengths: Sequence[int] | Tensor | None = None,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
        draft_chunk_size: int | None = None,
        draft_tokens: int = 4,
    ) -> Tensor:
        """Continues ``prompt (B, N)`` by ``num_tokens`` tokens: ``(B, num_tokens)`` int64.

        ``lengths`` as in :meth:`start`. With a ``draft_chunk_size`` the model drafts for itself at
        that size, ``draft_tokens`` at a time, and verifies at ``chunk_size``: the same distribution
        (:func:`speculative_sample`).
        """
        total = check_length(prompt, num_tokens, self.config.max_tokens)
        check_sampling(num_tokens, temperature, draft_tokens)

        def start(size: int, ahead: int) -> CATDecoding:
            pool = self.block_pool(prompt.shape[0], total, chunk_size=size, draft_tokens=ahead)
            return self.start(prompt, pool, chunk_size=size, lengths=lengths)

        if draft_chunk_size is None:
            decoding = start(chunk_size, 0)
            return sample(decoding, num_tokens, temperature=temperature, generator=generator)
        from torch_winnow.models.speculation import speculative_sample

        self._check_size(draft_chunk_size, "draft_chunk_size")
        # One token more than drafts in a pass of the target: the one before them.
        target = start(chunk_size, draft_tokens + 1)
        draft = start(draft_chunk_size, draft_tokens + 1)
        return speculative_sample(
            target,
            draft,
            num_tokens,
            draft_tokens=draft_tokens,
            temperature=temperature,
            generator=generator,
        ).tokens

    def _check(self, tokens: Tensor, chunk_size: int, name: str = "tokens") -> Tensor:
        self._check_size(chunk_size)
        tokens = check_tokens(tokens, self.config.vocab_size, name)
        if tokens.shape[1] > self.config.max_tokens:
            raise ValueError(
                f"{name}: expected at most max_tokens={self.config.max_tokens}, got "
                f"{tokens.shape[1]}"
            )
        return tokens

    def _check_size(self, chunk_size: int, name: str = "chunk_size") -> None:
        if chunk_size not in self.config.chunk_sizes:
            raise ValueError(f"{name}: expected one of {self.config.chunk_sizes}, got {chunk_size}")

    def vectors(self, chunks: Tensor) -> Tensor:
        """The dummy and the vectors of ``chunks (B, K, C)``: ``(B, K + 1, width)``."""
        dummy = self.dummy_vectors[self.config.chunk_sizes.index(chunks.shape[2])]
        dummy = dummy.expand(chunks.shape[0], 1, -1)
        if not chunks.shape[1]:
            return dummy
        vectors = self.compressor(chunks)
        return torch.cat((dummy.to(vectors.dtype), vectors), dim=1)

    def _positions(self, rows: Tensor, block: int) -> Tensor:
        """Rotary positions of rows that are numbered through all blocks."""
        return rows if self.config.positions == "sequence" else rows % block

    def separator(self, chunk_size: int) -> Tensor:
        """The row ``(width,)`` of an adaptive model between a chunk's vector and its tokens."""
        assert self.separators is not None
        return self.separators[self.config.chunk_sizes.index(chunk_size)]


def _waves(count: int, width: int) -> Tensor:
    """Sinusoids of geometrically spaced lengths, of unit mean square: ``(count, width)``."""
    frequency = torch.logspace(0, -math.log10(4 * count), (width + 1) // 2, dtype=torch.float64)
    angle = torch.outer(torch.arange(count, dtype=torch.float64), frequency)
    waves = torch.cat((angle.sin(), angle.cos()), dim=1)[:, :width]
    return (math.sqrt(2) * waves).float()
