"""A dense causal decoder: what the Compress & Attend Transformer is compared with.

The same layers at the same width, so that what differs is the attention and nothing else: training
through ``scaled_dot_product_attention``, generation through the same pages and the same
``paged_attention`` as the CAT.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from torch_winnow.kvcache import BlockPool, PagedKVCache
from torch_winnow.models.decoding import (
    Decoding,
    check_length,
    check_lengths,
    fork_blocks,
    host_range,
    make_pool,
    sample,
)
from torch_winnow.models.layers import Stack, StackConfig, attend_dense, check_tokens

__all__ = ["DenseConfig", "DenseDecoder", "DenseDecoding"]


@dataclass(frozen=True)
class DenseConfig:
    """Shape of a :class:`DenseDecoder`.

    Attributes:
        decoder: the layers.
        vocab_size: number of token ids.
        max_tokens: longest sequence.
    """

    decoder: StackConfig = field(default_factory=lambda: StackConfig(width=192, depth=4, heads=3))
    vocab_size: int = 256
    max_tokens: int = 4096


class DenseDecoder(nn.Module):
    """Causal transformer; row 0 is a learned start row, so token t is predicted at index t.

    Example:
        >>> import torch
        >>> from torch_winnow.models import DenseConfig, DenseDecoder, StackConfig
        >>> model = DenseDecoder(DenseConfig(StackConfig(width=32, depth=1, heads=2)))
        >>> model(torch.randint(256, (2, 10))).shape
        torch.Size([2, 10, 256])
    """

    def __init__(self, config: DenseConfig) -> None:
        super().__init__()
        self.config = config
        width = config.decoder.width
        self.embedding = nn.Embedding(config.vocab_size, width)
        self.start_row = nn.Parameter(torch.randn(width))
        self.stack = Stack(config.decoder, config.max_tokens + 1)  # the start row, then the tokens
        self.head = nn.Linear(width, config.vocab_size, bias=False)
        nn.init.normal_(self.head.weight, std=0.1 * width**-0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits ``(B, N, V)`` of tokens ``(B, N)``: index t is the distribution of token t.

        Raises:
            ValueError: if ``tokens`` is not ``(B, N)`` ids below ``vocab_size``, or N is above
                ``max_tokens``.
        """
        tokens = self._check(tokens)
        rows = self.rows(tokens[:, :-1])[:, : tokens.shape[1]]
        hidden = self.stack(rows, slice(0, rows.shape[1]), _causal)
        return self.head(hidden)  # type: ignore[no-any-return]

    def block_pool(
        self, batch_size: int, max_tokens: int, *, draft_tokens: int = 0, spare_blocks: int = 0
    ) -> BlockPool:
        """Pages for ``batch_size`` sequences of up to ``max_tokens`` tokens.

        With ``draft_tokens`` a fork of each sequence has room for so many steps of its own.
        """
        return make_pool(
            self.stack,
            batch_size,
            max_tokens + 1,
            fork_blocks=fork_blocks(draft_tokens),
            spare_blocks=spare_blocks,
        )

    @torch.inference_mode()
    def start(
        self, prompt: Tensor, pool: BlockPool, *, lengths: Sequence[int] | Tensor | None = None
    ) -> DenseDecoding:
        """Reads ``prompt (B, N)`` (N may be 0) and returns the sequences, ready to grow.

        Of prompt b the first ``lengths[b]`` tokens count, by default all.
        """
        prompt = self._check(prompt, "prompt")
        cache = PagedKVCache(pool, prompt.shape[0])
        return DenseDecoding(self, prompt, check_lengths(lengths, prompt), cache)

    def generate(
        self,
        prompt: Tensor,
        num_tokens: int,
        *,
        lengths: Sequence[int] | Tensor | None = None,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Continues ``prompt (B, N)`` by ``num_tokens`` tokens: ``(B, num_tokens)`` int64.

        ``lengths`` as in :meth:`start`.
        """
        total = check_length(prompt, num_tokens, self.config.max_tokens)
        pool = self.block_pool(prompt.shape[0], total)
        decoding = self.start(prompt, pool, lengths=lengths)
        return sample(decoding, num_tokens, temperature=temperature, generator=generator)

    def rows(self, tokens: Tensor) -> Tensor:
        """What the stack reads, ``(B, N + 1, width)``: the start row, then one row per token."""
        start = self.start_row.expand(tokens.shape[0], 1, -1)
        return torch.cat((start, self.embedding(tokens)), dim=1)

    def _check(self, tokens: Tensor, name: str = "tokens") -> Tensor:
        return check_tokens(tokens, self.config.vocab_size, self.config.max_tokens, name)


class DenseDecoding(Decoding):
    """Sequences of a :class:`DenseDecoder`: one cache row per token, after the start row."""

    def __init__(
        self, model: DenseDecoder, prompt: Tensor, lengths: Tensor, cache: PagedKVCache
    ) -> None:
        super().__init__(model.stack, cache, lengths, model.config.max_tokens)
        self._model = model
        rows = model.rows(prompt)
        self.logits = model.head(self._prefill(rows, host_range(rows.shape[1]), lengths + 1))

    def _step(self, tokens: Tensor) -> Tensor:
        rows = self._model.embedding(tokens).unsqueeze(1)
        positions = self.lengths[:, None] + 1
        return self._model.head(self._extend(rows, positions)[:, -1])  # type: ignore[no-any-return]

    def _append(self, tokens: Tensor, counts: Tensor) -> Tensor:
        place = host_range(1, tokens.shape[1] + 1).minimum(counts[:, None])
        positions = self.lengths[:, None] + place
        rows = self._model.embedding(tokens)
        return self._model.head(self._extend(rows, positions, counts))  # type: ignore[no-any-return]

    def _truncate(self, lengths: Tensor) -> None:
        self.cache.truncate_(lengths + 1)


def _causal(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return attend_dense(query, key, value, causal=True)
