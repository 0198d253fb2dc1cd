"""Generating with a Compress & Attend Transformer: K vectors and a chunk's rows in pages."""

from __future__ import annotations

import torch
from torch import Tensor

from torch_winnow.kvcache import PagedKVCache
from torch_winnow.models.cat import CompressAttendTransformer
from torch_winnow.models.decoding import Decoding

__all__ = ["CATDecoding"]


class CATDecoding(Decoding):
    """Sequences of a CAT: vectors 0..n in the cache, then the rows of the chunk being decoded.

    When a chunk is full, its rows are dropped and its vector takes their place. Sequences may stand
    at different places of their chunks, so at one step some turn theirs and others don't.
    """

    def __init__(
        self,
        model: CompressAttendTransformer,
        prompt: Tensor,
        lengths: Tensor,
        cache: PagedKVCache,
        chunk_size: int,
    ) -> None:
        super().__init__(model.stack, cache, lengths, model.config.max_tokens)
        self._model, self._size = model, chunk_size
        self._lead = model.config.leading_rows
        batch, longest = prompt.shape
        most = longest // chunk_size
        full, tail = lengths // chunk_size, lengths % chunk_size
        column = torch.arange(chunk_size)
        self._chunk = prompt.new_zeros((batch, chunk_size))
        if longest:
            begun = (full[:, None] * chunk_size + column).clamp(max=longest - 1)
            self._chunk = prompt.gather(1, begun)
        # Completed chunks are seen through their vectors alone: their tokens need no rows. What a
        # sequence holds is picked from the vectors of all, the separator and the tokens of all.
        parts = [model.vectors(prompt[:, : most * chunk_size].view(batch, most, chunk_size))]
        if model.separators is not None:
            parts.append(model.separator(chunk_size).expand(batch, 1, -1))
        parts.append(model.embedding(prompt))
        counts = full + self._lead + tail
        row = torch.arange(int(counts.max()) if batch else 0)
        after = row - full[:, None]  # 0 at the last vector
        token = most + full[:, None] * chunk_size + after
        index = torch.where(after <= 0, row, torch.where(after < self._lead, most + after, token))
        index = torch.where(row < counts[:, None], index, 0)
        rows = torch.cat(parts, dim=1)
        rows = rows.gather(1, index[:, :, None].expand(-1, -1, rows.shape[2]))
        positions = self._positions(torch.minimum(row, full[:, None]), after.clamp(min=0))
        self.logits = model.head(self._prefill(rows, positions, counts))

    @torch.inference_mode()
    def step(self, tokens: Tensor) -> Tensor:
        model = self._model
        done, offset = self.lengths // self._size, self.lengths % self._size
        self._lengthen()
        self._chunk[torch.arange(len(tokens)), offset] = tokens
        turns = offset + 1 == self._size
        rows = model.embedding(tokens).unsqueeze(1)
        counts = None
        first = self._lead + offset
        if turns.any():
            rows, counts = self._turn_chunks(rows, turns, done + 1)
            done, first = done + turns, torch.where(turns, 0, first)
        positions = self._positions(done[:, None], first[:, None] + torch.arange(rows.shape[1]))
        self.logits = model.head(self._extend(rows, positions, counts))
        return self.logits

    def _select(self, sequences: Tensor) -> None:
        super()._select(sequences)
        self._chunk = self._chunk[sequences]

    def _positions(self, block: Tensor, offset: Tensor) -> Tensor:
        """Rotary positions of rows; those that only fill up may lie past the table's end."""
        config = self._model.config
        between = config.block_start(1, self._size)  # from one block's first row to the next
        return (block * between + offset).clamp(max=config.rotary_positions - 1)

    def _turn_chunks(
        self, rows: Tensor, turns: Tensor, vectors: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Replaces finished chunks' rows by the first rows of their next blocks.

        ``vectors`` is how many a sequence that turns has held; returns the rows of all sequences
        and how many of them are each one's own (None: all).
        """
        model = self._model
        self.cache.truncate_(torch.where(turns, vectors, self.cache.seq_lens))
        chunks = self._chunk[turns].unsqueeze(1)
        first: Tensor = model.compressor(chunks, vectors[turns].unsqueeze(1) - 1)
        if model.separators is not None:
            separator = model.separator(self._size).expand(len(first), 1, -1)
            first = torch.cat((first, separator), dim=1)
        if turns.all():
            return first, None
        mixed = first.new_zeros((len(turns), self._lead, first.shape[2]))
        mixed[:, :1] = rows
        mixed[turns] = first
        return mixed, torch.where(turns, self._lead, 1)
