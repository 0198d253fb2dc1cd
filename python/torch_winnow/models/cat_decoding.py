"""Generating with a Compress & Attend Transformer: K vectors and a chunk's rows in pages."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from torch_winnow.kvcache import PagedKVCache
from torch_winnow.models.cat import CompressAttendTransformer
from torch_winnow.models.decoding import Decoding, host_range, last

__all__ = ["CATDecoding"]


class CATDecoding(Decoding):
    """Sequences of a CAT: vectors 0..n in the cache, then the rows of the chunk being decoded.

    When a chunk is full, its rows are dropped and its vector takes their place. Sequences may stand
    at different places of their chunks, so at one step some turn theirs and others don't.

    **Several tokens in one pass.** Tokens on both sides of a chunk's end see different caches:
    those before it the chunk's rows, those after it the chunk's vector instead. So ``extend`` forks
    each sequence once per chunk end that it passes. Fork k drops the rows of the chunk and holds
    the vectors of the k chunks that were finished on the way, and the tokens that follow; all forks
    go through the layers together, and share the pages of the vectors before. They are kept until
    the tokens are settled: a rejected token is taken back by going on from the fork in which the
    last one kept lies.
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
        column = host_range(chunk_size)
        self._forks: _Forks | None = None
        self._chunk = prompt.new_zeros((batch, chunk_size))
        if longest:
            begun = (full[:, None] * chunk_size + column).clamp(max=longest - 1)
            self._chunk = prompt.gather(1, begun.to(prompt.device))
        # Completed chunks are seen through their vectors alone: their tokens need no rows. What a
        # sequence holds is picked from the vectors of all, the separator and the tokens of all.
        parts = [model.vectors(prompt[:, : most * chunk_size].view(batch, most, chunk_size))]
        if model.separators is not None:
            parts.append(model.separator(chunk_size).expand(batch, 1, -1))
        parts.append(model.embedding(prompt))
        counts = full + self._lead + tail
        row = host_range(int(counts.max()) if batch else 0)
        after = row - full[:, None]  # 0 at the last vector
        token = most + full[:, None] * chunk_size + after
        index = torch.where(after <= 0, row, torch.where(after < self._lead, most + after, token))
        index = torch.where(row < counts[:, None], index, 0)
        rows = torch.cat(parts, dim=1)
        rows = rows[host_range(batch)[:, None], index]
        positions = self._positions(torch.minimum(row, full[:, None]), after.clamp(min=0))
        self.logits = model.head(self._prefill(rows, positions, counts))

    def _step(self, tokens: Tensor) -> Tensor:
        model = self._model
        done, offset = self.lengths // self._size, self.lengths % self._size
        self._chunk[host_range(len(tokens)), offset] = tokens
        turns = offset + 1 == self._size
        rows = model.embedding(tokens).unsqueeze(1)
        counts = None
        first = self._lead + offset
        if turns.any():
            rows, counts = self._turn_chunks(rows, turns, done + 1)
            done, first = done + turns, torch.where(turns, 0, first)
        positions = self._positions(done[:, None], first[:, None] + host_range(rows.shape[1]))
        hidden = last(self._extend(rows, positions, counts), counts)
        return model.head(hidden)  # type: ignore[no-any-return]

    def _append(self, tokens: Tensor, counts: Tensor) -> Tensor:
        model, size = self._model, self._size
        batch, longest = tokens.shape
        done, offset = self.lengths // size, self.lengths % size
        total = offset + counts
        # Each chunk's tokens from its begin on, those before the extension included.
        chunks = torch.cat((self._chunk, self._chunk.new_zeros((batch, longest))), dim=1)
        chunks[host_range(batch)[:, None], offset[:, None] + host_range(longest)] = tokens

        number = total // size + 1
        first = number.cumsum(0) - number
        owner = host_range(batch).repeat_interleave(number)
        turn = host_range(len(owner)) - first[owner]  # chunk ends that the fork has passed
        forks = _Forks(self.cache.fork(owner), first, chunks)
        rows, positions, own = self._fork_rows(chunks, done, offset, total, owner, turn)

        # With the sequences' own references gone, only what really diverges is copied.
        self.cache = forks.cache
        held = self.cache.seq_lens
        self.cache.truncate_(torch.where(turn > 0, done[owner] + 1, held))
        try:
            hidden = self._extend(rows, positions, own)
        except BaseException:
            self.cache = self.cache.fork(first)
            raise
        self._forks = forks
        self.cache = forks.cache.fork(first + number - 1)
        self._chunk = forks.chunk(total, size)

        after = offset[:, None] + host_range(1, longest + 1)
        after = after.minimum(total[:, None])
        into = after // size
        # A chunk's last token has no row: what follows it is read off the next chunk's first rows.
        column = torch.where(
            into > 0, into + self._lead - 2 + after % size, after - 1 - offset[:, None]
        )
        found = hidden[first[:, None] + into, column.clamp(min=0)]
        return model.head(found)  # type: ignore[no-any-return]

    def _fork_rows(
        self,
        chunks: Tensor,
        done: Tensor,
        offset: Tensor,
        total: Tensor,
        owner: Tensor,
        turn: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What the forks append: rows ``(R, T, width)``, positions, how many are each one's own.

        Fork ``turn`` of sequence ``owner`` appends that many vectors, a separator and the tokens of
        its chunk; fork 0 goes on in the chunk that is there.
        """
        model, size = self._model, self._size
        batch, width = chunks.shape
        passed = total // size
        ends = int(passed.max())
        finished = host_range(ends) < passed[:, None]
        vectors = model.embedding.weight.new_empty((0, model.embedding.weight.shape[1]))
        if finished.any():
            full = chunks[:, : ends * size].view(batch, ends, size)[finished].unsqueeze(1)
            places = (done[:, None] + host_range(ends))[finished].unsqueeze(1)
            vectors = model.compressor(full, places).flatten(0, 1)
        begin = passed.cumsum(0) - passed  # a sequence's first vector
        parts = [vectors]
        if model.separators is not None:
            parts.append(model.separator(size)[None])
        parts.append(model.embedding(chunks).flatten(0, 1))

        lead = torch.where(turn > 0, turn + self._lead - 1, 0)
        start = torch.where(turn > 0, 0, offset[owner])  # place in the chunk of the first token
        own = lead + (total[owner] - turn * size).clamp(max=size - 1) - start
        row = host_range(int(own.max()))
        place = row - lead[:, None] + start[:, None]
        token = len(vectors) + self._lead - 1 + owner[:, None] * width
        token = token + turn[:, None] * size + place
        vector = row < turn[:, None]
        index = torch.where(
            vector,
            begin[owner][:, None] + row,
            torch.where(row < lead[:, None], len(vectors), token),
        )
        index = torch.where(row < own[:, None], index, 0)
        rows = torch.cat(parts)[index]
        block = done[owner][:, None] + torch.where(vector, row + 1, turn[:, None])
        within = torch.where(row < lead[:, None], 1, self._lead + place)
        return rows, self._positions(block, torch.where(vector, 0, within)), own

    def _truncate(self, lengths: Tensor) -> None:
        forks, size = self._forks, self._size
        assert forks is not None
        assert self._extension is not None
        before = self._extension.before
        total = lengths - before // size * size
        self.cache = forks.cache.fork(forks.first + total // size)
        self.cache.truncate_(lengths // size + self._lead + lengths % size)
        self._chunk = forks.chunk(total, size)

    def _settle(self, counts: Tensor | int) -> None:
        super()._settle(counts)
        self._forks = None

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


class _Forks(NamedTuple):
    """The caches that an extension went through, until its tokens are settled.

    Attributes:
        cache: one row per sequence and chunk that it has reached.
        first: ``(B,)``, the row of the chunk in which each sequence was.
        chunks: ``(B, C + T)``, the tokens from that chunk's begin on.
    """

    cache: PagedKVCache
    first: Tensor
    chunks: Tensor

    def chunk(self, total: Tensor, size: int) -> Tensor:
        """The tokens ``(B, C)`` of the chunk that ``total (B,)`` tokens reach into."""
        column = (total // size * size)[:, None] + host_range(size)
        column = column.clamp(max=self.chunks.shape[1] - 1)
        return self.chunks.gather(1, column.to(self.chunks.device))
