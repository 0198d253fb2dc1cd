"""The pages behind a ``WinnowCache``, and what transformers counts that the pages do not."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from torch_winnow._kvcache.mirror import sent
from torch_winnow.integrations.transformers.sparse import BlockSparse
from torch_winnow.kvcache import BlockPool, BlockPoolExhausted, PagedKVCache


class PagedStorage:
    """One :class:`PagedKVCache` for all layers, made when the first keys show their shape.

    Transformers counts *columns*: the tokens that every row was given, padding included. Columns of
    left padding are not stored (``dropped[b]`` of them in row ``b``), so position ``p`` of a row's
    pages is its column ``dropped[b] + p``.

    Attributes:
        columns: per layer, the columns seen.
        dropped: per row, the columns at its left that are padding; None where no row has any.
    """

    def __init__(
        self,
        num_layers: int,
        block_size: int,
        max_cache_len: int | None,
        sparse: BlockSparse | None,
        pool: BlockPool | None,
        cache_dtype: torch.dtype | None = None,
    ) -> None:
        self.cache_dtype = cache_dtype
        self.dtype: torch.dtype | None = None  # of the keys and values that came
        self.block_size = block_size
        self.max_cache_len = max_cache_len
        self.sparse = sparse
        self.columns = [0] * num_layers
        self.dropped: list[int] | None = None
        self._grows = pool is None
        self._pool = pool
        self._pages: PagedKVCache | None = None
        self._epoch = 0  # counts changes that are no appends
        self._padding: tuple[int, int, list[int]] | None = None  # of the columns to come

    @property
    def pool(self) -> BlockPool:
        if self._pool is None:
            raise RuntimeError("WinnowCache: there is no pool before the first forward pass")
        return self._pool

    @property
    def pages(self) -> PagedKVCache:
        if self._pages is None:
            raise RuntimeError("WinnowCache: there are no pages before the first forward pass")
        return self._pages

    @property
    def rows(self) -> int:
        """Rows of the batch, -1 before the first forward pass."""
        return -1 if self._pages is None else self._pages.batch_size

    def _hold(self, pages: PagedKVCache) -> None:
        """Keep pages whose tokens stay where they are: a position stands for a column."""
        pages._holder = "a WinnowCache"
        self._pages = pages

    def stamp(self, layer: int) -> tuple[int, int]:
        """What changes with whatever a view of this layer shows."""
        return self._epoch, self.columns[layer]

    # Left padding: the mask is seen before the keys.

    def forget(self) -> None:
        """What was announced belonged to a step that did not come."""
        self._padding = None

    def announce(self, offset: int, tokens: int, mask: Tensor | None) -> bool:
        """Learn which of the next ``tokens`` columns are left padding and need no page.

        ``mask`` is ``(B, offset + tokens)`` bool. True if the pages describe it: all that it hides
        is left padding and not stored.
        """
        self._padding = None
        if mask is not None and any(self.columns) and len(mask) != self.rows:
            raise ValueError(
                f"attention_mask: expected {self.rows} rows, as the cache has, got {len(mask)}; "
                "reset() the cache for another batch"
            )
        dropped = self.dropped or [0] * len(mask if mask is not None else ())
        padding: list[int] | None = None
        if mask is None or bool(mask.all()):
            padding = [0] * len(dropped)
        else:
            visible = mask.sum(1)
            total = mask.shape[1]
            left = (torch.arange(total, device=mask.device) >= total - visible[:, None]).eq(mask)
            if bool(left.all()):
                padding = (total - visible).tolist()
        shown = None if padding is None else [min(pad, offset) for pad in padding]
        if shown == dropped:
            if padding is not None and any(pad > offset for pad in padding):
                self._padding = offset, tokens, [max(0, pad - offset) for pad in padding]
            return True
        if self.dropped is not None:
            hidden = ~mask if mask is not None else torch.zeros(len(dropped), offset + tokens)
            self.check_hidden(hidden)
        return False

    def check_hidden(self, hidden: Tensor) -> None:
        """Raise if a mask ``(B, columns)`` shows padding that was not stored."""
        for row, count in enumerate(self.dropped or ()):
            if not bool(hidden[row, :count].all()):
                raise ValueError(
                    f"attention_mask: shows columns of row {row} that were left padding "
                    f"({count} of them) when the prompt ran, so their keys were not stored; pass "
                    "the prompt's mask, continued by ones"
                )

    # Storing.

    def append(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Store the new columns of a layer, without those that were announced as padding."""
        tokens = key.shape[2]
        start = self.columns[layer]
        if self._pages is None or (len(key) != self.rows and not any(self.columns)):
            self._create(key, value)
        padding = lengths = None
        if self._padding is not None and self._padding[:2] == (start, tokens):
            # Real tokens come first, because append stores the first ones of each row.
            padding = self._padding[2]
            lengths = [tokens - pad for pad in padding]
            order = sent(torch.tensor(padding)[:, None] + torch.arange(tokens), key.device)
            rows = torch.arange(len(order), device=key.device)[:, None]
            key, value = (
                x[rows, :, order.clamp(max=tokens - 1)].transpose(1, 2) for x in (key, value)
            )
        try:
            self.pages.append(layer, key, value, lengths=lengths)
        except BlockPoolExhausted as error:
            if not self._grow(error.needed - error.free):
                raise
            self.pages.append(layer, key, value, lengths=lengths)
        if padding is not None and start == max(self.columns):  # the step's first layer
            before = self.dropped or [0] * len(padding)
            self.dropped = [a + b for a, b in zip(before, padding, strict=True)]
        self.columns[layer] = start + tokens

    def _create(self, key: Tensor, value: Tensor) -> None:
        rows, heads, tokens, dim = key.shape
        if self._pool is None:
            blocks = self._limit(rows)
            if blocks is None:
                blocks = self._with_room(rows * -(-tokens // self.block_size), rows)
            self._pool = BlockPool(
                blocks,
                num_layers=len(self.columns),
                num_kv_heads=heads,
                head_dim=dim,
                value_head_dim=value.shape[3],
                block_size=self.block_size,
                dtype=self.cache_dtype or key.dtype,
                device=key.device,
                summaries=self.sparse.summary if self.sparse else None,
            )
        self.dtype = key.dtype if self._pool.quantised else self._pool.dtype
        self._hold(PagedKVCache(self._pool, rows))

    def _limit(self, rows: int) -> int | None:
        if self.max_cache_len is None:
            return None
        return rows * -(-self.max_cache_len // self.block_size)

    @staticmethod
    def _with_room(blocks: int, rows: int) -> int:
        # A quarter more, so that growing to n blocks copies less than 5 n of them in all.
        return blocks + max(blocks // 4, 2 * rows)

    def _grow(self, missing: int) -> bool:
        """Whether the pool could be enlarged by what is missing."""
        if not self._grows:
            return False
        with self.pool._lock:  # copies of this cache may be at it too, in other threads
            needed = self.pool.num_blocks + missing
            limit = self._limit(self.rows)
            if limit is not None and needed > limit:
                return False
            self.pool.grow(self._with_room(needed, self.rows) if limit is None else limit)
        return True

    # Rows and lengths.

    def take(self, rows: Sequence[int]) -> None:
        """Row ``r`` continues what was row ``rows[r]``; blocks are shared, keys not copied."""
        if self._pages is None:
            return
        if len(rows) == self.rows:
            self._pages.permute_(rows)
        else:
            self._hold(self._pages.fork(rows))
        if self.dropped is not None:
            self.dropped = [self.dropped[row] for row in rows]
        self._epoch += 1

    def register_prefix(self, tokens: Sequence[Sequence[int]]) -> int:
        """Make the full blocks of every row findable; returns how many columns are, at least."""
        found = [self.pages.register_prefix(row, row=index) for index, row in enumerate(tokens)]
        return min(found, default=0)

    def match_prefix(self, tokens: Sequence[Sequence[int]], dropped: Sequence[int]) -> int:
        """Begin with blocks that are known for rows of these tokens; returns the columns covered.

        ``dropped`` columns lie to the left of a row's tokens. All rows go on from one column, so
        the shortest find counts.
        """
        if self._pages is not None:
            raise ValueError("WinnowCache: only an empty cache can begin with a known prefix")
        if self._pool is None:
            return 0
        pages = PagedKVCache(self._pool, len(tokens))
        found = [
            pad + pages.match_prefix(row, row=index)
            for index, (row, pad) in enumerate(zip(tokens, dropped, strict=True))
        ]
        columns = min(found, default=0)
        if columns == 0:
            return 0
        pages.truncate_([max(0, columns - pad) for pad in dropped])
        self._hold(pages)
        self.columns = [columns] * len(self.columns)
        self.dropped = [min(pad, columns) for pad in dropped] if any(dropped) else None
        self._epoch += 1
        return columns

    def crop(self, columns: int) -> None:
        """Keep the first ``columns`` columns."""
        if self._pages is None or columns >= max(self.columns):
            return
        dropped = self.dropped or [0] * self.rows
        lengths = self._pages.seq_lens.tolist()
        self._pages.truncate_(
            [min(n, max(0, columns - d)) for n, d in zip(lengths, dropped, strict=True)]
        )
        self.columns = [min(n, columns) for n in self.columns]
        dropped = [min(d, columns) for d in dropped]
        self.dropped = dropped if any(dropped) else None
        self._epoch += 1

    def reset(self) -> None:
        """Give all blocks back and start anew, with any number of rows."""
        self._pages = None
        self.columns = [0] * len(self.columns)
        self.dropped = self._padding = None
        self._epoch += 1

    def fork(self) -> PagedStorage:
        """A storage that continues every row and shares its blocks."""
        twin = PagedStorage.__new__(PagedStorage)
        twin.__dict__.update(self.__dict__)
        twin.columns = list(self.columns)
        if self._pages is not None:
            twin._hold(self._pages.fork(range(self.rows)))
        return twin

    # Reading.

    def gather(self, layer: int, part: int) -> Tensor:
        """Dense ``(B, Hkv, columns, D)``; zeros where padding was not stored."""
        pages = self.pool._layers[layer][part]

        def taken(block: Tensor, *slots: slice | Tensor) -> Tensor:
            tokens = pages[(block, *slots)]
            if not self.pool.quantised:
                return tokens
            scales = self.pool._scales[layer][part][block]
            factor = scales.view(scales.shape + (1,) * (tokens.dim() - scales.dim()))
            return (tokens.float() * factor).to(self.dtype)

        table = self.pages.block_table.clamp(min=0).long()
        columns = self.columns[layer]
        if self.dropped is None:
            return taken(table).transpose(1, 2).flatten(2, 3)[:, :, :columns]
        dropped = sent(torch.tensor(self.dropped), pages.device)
        position = torch.arange(columns, device=pages.device) - dropped[:, None]
        stored = position.clamp(min=0)
        block = table.gather(1, stored // self.block_size)
        dense = taken(block, slice(None), stored % self.block_size)
        return dense.masked_fill(position[..., None, None] < 0, 0).transpose(1, 2)
