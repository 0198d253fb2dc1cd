"""Random operations on caches that share a pool, against a model of plain lists.

The model knows no reference counts: a block is an object, its owners are found by looking through
every row of every cache. After each operation the tables, the free blocks, the sharing and every
stored token must agree, and a pool must run out exactly where the model says so.
"""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from torch_winnow.kvcache import BlockPool, BlockPoolExhausted, PagedKVCache

LAYERS, HEADS, DIM, VALUE_DIM, BLOCK, BLOCKS = 2, 2, 3, 2, 4, 12


class Row:
    """Blocks as objects, and per layer the tokens it has stored."""

    def __init__(self) -> None:
        self.blocks: list[object] = []
        self.tokens: list[list[int]] = [[] for _ in range(LAYERS)]
        self.freed = False

    def length(self) -> int:
        return max(len(tokens) for tokens in self.tokens)

    def copy(self) -> Row:
        row = Row()
        row.blocks = list(self.blocks)
        row.tokens = [list(tokens) for tokens in self.tokens]
        row.freed = self.freed
        return row


class CacheMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(
            BLOCKS,
            num_layers=LAYERS,
            num_kv_heads=HEADS,
            head_dim=DIM,
            value_head_dim=VALUE_DIM,
            block_size=BLOCK,
            dtype=torch.float32,
        )
        self.caches: list[tuple[PagedKVCache, list[Row]]] = []
        self.blocks = BLOCKS
        self.counter = 0

    def owners(self, block: object) -> int:
        return sum(block is held for _, rows in self.caches for row in rows for held in row.blocks)

    def free_blocks(self) -> int:
        return self.blocks - len(
            {id(b) for _, rows in self.caches for row in rows for b in row.blocks}
        )

    def claim(self, rows: list[Row], touched: list[tuple[int, list[int]]]) -> bool:
        """Give each (row, block indices) blocks of its own; undo it if there are too few."""
        before = [list(row.blocks) for row in rows]
        free = self.free_blocks()
        for r, indices in touched:
            for i in sorted(set(indices)):
                if i == len(rows[r].blocks):
                    rows[r].blocks.append(object())
                    free -= 1
                elif self.owners(rows[r].blocks[i]) > 1:
                    rows[r].blocks[i] = object()
                    free -= 1
        if free < 0:
            for row, blocks in zip(rows, before, strict=True):
                row.blocks = blocks
        return free >= 0

    def fresh_tokens(
        self, rows: int, tokens: int
    ) -> tuple[list[list[int]], torch.Tensor, torch.Tensor]:
        ids = [[self.counter + r * tokens + t for t in range(tokens)] for r in range(rows)]
        self.counter += rows * tokens
        numbers = torch.tensor(ids, dtype=torch.float32).view(rows, 1, tokens, 1)
        offsets = torch.arange(HEADS).view(1, HEADS, 1, 1) / 4
        key = (numbers + offsets).expand(rows, HEADS, tokens, DIM).contiguous()
        value = -(numbers + offsets).expand(rows, HEADS, tokens, VALUE_DIM).contiguous()
        return ids, key, value

    def pick(self, data: st.DataObject) -> tuple[PagedKVCache, list[Row]]:
        return self.caches[data.draw(st.integers(0, len(self.caches) - 1))]

    @precondition(lambda self: len(self.caches) < 4)
    @rule(rows=st.integers(0, 3))
    def create(self, rows: int) -> None:
        self.caches.append((PagedKVCache(self.pool, rows), [Row() for _ in range(rows)]))

    @precondition(lambda self: self.caches)
    @rule(data=st.data(), layer=st.integers(0, LAYERS - 1), tokens=st.integers(0, 6))
    def append(self, data: st.DataObject, layer: int, tokens: int) -> None:
        cache, rows = self.pick(data)
        lengths = None
        if data.draw(st.booleans()):
            lengths = [data.draw(st.integers(0, tokens)) for _ in rows]
        counts = [tokens] * len(rows) if lengths is None else lengths
        touched = []
        for r, (row, count) in enumerate(zip(rows, counts, strict=True)):
            start = len(row.tokens[layer])
            touched.append((r, [p // BLOCK for p in range(start, start + count)]))
        ids, key, value = self.fresh_tokens(len(rows), tokens)
        if not self.claim(rows, touched):
            with pytest.raises(BlockPoolExhausted):
                cache.append(layer, key, value, lengths=lengths)
            return
        cache.append(layer, key, value, lengths=lengths)
        for row, new, count in zip(rows, ids, counts, strict=True):
            row.tokens[layer] += new[:count]
            row.freed = row.freed and count == 0

    @precondition(lambda self: any(r.length() for _, rows in self.caches for r in rows))
    @rule(data=st.data(), layer=st.integers(0, LAYERS - 1), tokens=st.integers(0, 5))
    def write(self, data: st.DataObject, layer: int, tokens: int) -> None:
        cache, rows = self.pick(data)
        if not all(len(row.tokens[layer]) for row in rows):
            return
        positions = [
            [data.draw(st.integers(0, len(row.tokens[layer]) - 1)) for _ in range(tokens)]
            for row in rows
        ]
        ids, key, value = self.fresh_tokens(len(rows), tokens)
        where = torch.tensor(positions, dtype=torch.int32).view(len(rows), tokens)
        touched = [(r, [p // BLOCK for p in row]) for r, row in enumerate(positions)]
        if not self.claim(rows, touched):
            with pytest.raises(BlockPoolExhausted):
                cache.write(layer, key, value, where)
            return
        cache.write(layer, key, value, where)
        for row, new, at in zip(rows, ids, positions, strict=True):
            for token, position in zip(new, at, strict=True):
                row.tokens[layer][position] = token

    @precondition(lambda self: 0 < len(self.caches) < 4)
    @rule(data=st.data(), count=st.integers(0, 4))
    def fork(self, data: st.DataObject, count: int) -> None:
        cache, rows = self.pick(data)
        if not rows:
            return
        parents = [data.draw(st.integers(0, len(rows) - 1)) for _ in range(count)]
        self.caches.append((cache.fork(parents), [rows[p].copy() for p in parents]))

    @precondition(lambda self: self.caches)
    @rule(data=st.data())
    def permute(self, data: st.DataObject) -> None:
        cache, rows = self.pick(data)
        ancestors = [data.draw(st.integers(0, len(rows) - 1)) for _ in rows]
        cache.permute_(torch.tensor(ancestors, dtype=torch.int64))
        rows[:] = [rows[a].copy() for a in ancestors]

    @precondition(lambda self: self.caches)
    @rule(data=st.data())
    def truncate(self, data: st.DataObject) -> None:
        cache, rows = self.pick(data)
        lengths = [data.draw(st.integers(0, row.length())) for row in rows]
        cache.truncate_(lengths)
        for row, length in zip(rows, lengths, strict=True):
            row.tokens = [tokens[:length] for tokens in row.tokens]
            row.blocks = row.blocks[: -(-length // BLOCK)]

    @precondition(lambda self: self.caches)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        cache, rows = self.pick(data)
        chosen = [r for r in range(len(rows)) if data.draw(st.booleans())]
        if any(rows[r].freed for r in chosen):
            with pytest.raises(ValueError, match="already free"):
                cache.free(chosen)
            return
        cache.free(chosen)
        for r in chosen:
            rows[r] = Row()
            rows[r].freed = True

    @precondition(lambda self: self.blocks < 2 * BLOCKS)
    @rule(more=st.integers(0, 3))
    def grow(self, more: int) -> None:
        self.blocks += more
        self.pool.grow(self.blocks)

    @precondition(lambda self: self.caches)
    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        del self.caches[data.draw(st.integers(0, len(self.caches) - 1))]

    @precondition(lambda self: self.caches)
    @rule(data=st.data())
    def refuse(self, data: st.DataObject) -> None:
        """Calls that must change nothing."""
        cache, rows = self.pick(data)
        _, key, value = self.fresh_tokens(len(rows), 2)
        beyond = torch.full((len(rows), 2), max([r.length() for r in rows], default=0))
        for call in (
            lambda: cache.append(LAYERS, key, value),
            lambda: cache.append(0, key.double(), value),
            lambda: cache.append(0, key, value, lengths=[3] * (len(rows) + 1)),
            lambda: cache.fork([len(rows)]),
            lambda: cache.permute_([0] * (len(rows) + 1)),
            lambda: cache.truncate_([row.length() + 1 for row in rows] + [0] * (not rows)),
            lambda: cache.free([len(rows)]),
            lambda: cache.write(0, key, value, beyond if rows else beyond[:, :1]),
        ):
            with pytest.raises(ValueError, match="expected"):
                call()

    @invariant()
    def agrees(self) -> None:
        assert self.pool.num_free_blocks == self.free_blocks()
        names: dict[object, int] = {}
        for cache, rows in self.caches:
            assert cache.seq_lens.tolist() == [row.length() for row in rows]
            table = cache.block_table
            assert table.shape == (len(rows), max([len(r.blocks) for r in rows], default=0))
            for row, blocks in zip(rows, table.tolist(), strict=True):
                assert blocks[len(row.blocks) :] == [-1] * (table.shape[1] - len(row.blocks))
                for held, block in zip(row.blocks, blocks, strict=False):
                    assert names.setdefault(held, block) == block
                for layer in range(LAYERS):
                    self.holds(row.tokens[layer], layer, blocks)
        assert len(set(names.values())) == len(names)

    def holds(self, tokens: list[int], layer: int, blocks: list[int]) -> None:
        where = [(blocks[p // BLOCK], p % BLOCK) for p in range(len(tokens))]
        if not where:
            return
        block, slot = torch.tensor(where).unbind(1)
        expected = torch.tensor(tokens, dtype=torch.float32)
        for head in range(HEADS):
            key = self.pool.key_pages[layer, block, head, slot]
            value = self.pool.value_pages[layer, block, head, slot]
            assert torch.equal(key, (expected + head / 4)[:, None].expand_as(key))
            assert torch.equal(value, -(expected + head / 4)[:, None].expand_as(value))

    def teardown(self) -> None:
        self.caches.clear()
        assert self.pool.num_free_blocks == self.blocks


TestCacheMachine = CacheMachine.TestCase
TestCacheMachine.settings = settings(
    max_examples=int(os.environ.get("WINNOW_FUZZ_EXAMPLES", "100")),
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
