"""Everything that a cache can do, in random order and on every kind of pool, against dictionaries.

The model is what each layer of each row has stored, as numbers. After each operation the pages must
hold them (codes: to half a step each time that they were quantised), the summaries must describe
them, and owners and free blocks must be what the tables say.
"""

from __future__ import annotations

import random
import threading

import pytest
import torch

from torch_winnow.kvcache import (
    BlockPool,
    BlockPoolExhausted,
    PagedKVCache,
    block_summaries,
    merge_similar_,
)

LAYERS, HEADS, DIM, VALUE_DIM, SIZE = 2, 2, 5, 3, 4


class Twin:
    """A cache and its model: per row and layer a list of tokens, and the ids of a known prefix."""

    def __init__(self, cache, rows):
        self.cache = cache
        self.rows = rows  # [row][layer] -> [(key, value, bias), ...]

    def lengths(self):
        return [max(map(len, row)) for row in self.rows]

    def even(self):
        return all(len(layer) == n for row, n in zip(self.rows, self.lengths(), strict=True)
                   for layer in row)  # fmt: skip


class Fuzz:
    def __init__(self, seed, pool, *, alone=True):
        self.random = random.Random(seed)
        self.noise = torch.Generator().manual_seed(seed)
        self.pool = pool
        self.alone = alone  # nobody else uses the pool
        self.twins = []
        self.waiting = None
        self.cut = set()  # blocks that a row holds less of than they were described with
        self.prefixes = []  # (ids, tokens of each layer)
        self.next_id = 1 + seed * 1_000_000

    # Operations.

    def create(self):
        if len(self.twins) < 5:
            rows = self.random.randint(0, 3)
            empty = [[[] for _ in range(LAYERS)] for _ in range(rows)]
            self.twins.append(Twin(PagedKVCache(self.pool, rows), empty))

    def tokens(self, rows, count):
        loud = self.random.choice([0.01, 1.0, 1.0, 30.0])
        result = [
            torch.randn(rows, HEADS, count, d, generator=self.noise) * loud
            for d in (DIM, VALUE_DIM)
        ]
        if self.random.random() < 0.2 and count > 1:  # similar ones, to be merged
            result = [x[:, :, :1].expand_as(x) for x in result]
        return [x.to(self.pool.dtype if not self.pool.quantised else torch.float32) for x in result]

    def append(self, twin):
        layers = (
            list(range(LAYERS)) if self.random.random() < 0.7 else [self.random.randrange(LAYERS)]
        )
        count = self.random.randint(0, 6)
        lengths = None
        if self.random.random() < 0.5:
            lengths = [self.random.randint(0, count) for _ in twin.rows]
        for layer in layers:
            key, value = self.tokens(len(twin.rows), count)
            self.tried(
                twin, lambda k=key, v=value, i=layer: twin.cache.append(i, k, v, lengths=lengths)
            )
            for r, row in enumerate(twin.rows):
                for t in range(count if lengths is None else lengths[r]):
                    row[layer].append(
                        (key[r, :, t].double(), value[r, :, t].double(), torch.zeros(HEADS))
                    )

    def write(self, twin):
        layer, count = self.random.randrange(LAYERS), self.random.randint(0, 5)
        if not all(row[layer] for row in twin.rows):
            return
        where = [
            [self.random.randrange(len(row[layer])) for _ in range(count)] for row in twin.rows
        ]
        key, value = self.tokens(len(twin.rows), count)
        positions = torch.tensor(where).view(len(twin.rows), count)
        self.tried(twin, lambda: twin.cache.write(layer, key, value, positions.long()))
        for r, row in enumerate(twin.rows):
            for t, position in enumerate(where[r]):
                row[layer][position] = (
                    key[r, :, t].double(),
                    value[r, :, t].double(),
                    torch.zeros(HEADS),
                )

    def fork(self, twin):
        if twin.rows and len(self.twins) < 5:
            parents = [
                self.random.randrange(len(twin.rows)) for _ in range(self.random.randint(0, 3))
            ]
            rows = [[list(layer) for layer in twin.rows[p]] for p in parents]
            self.twins.append(Twin(twin.cache.fork(parents), rows))

    def permute(self, twin):
        ancestors = [self.random.randrange(len(twin.rows)) for _ in twin.rows]
        twin.cache.permute_(ancestors)
        twin.rows = [[list(layer) for layer in twin.rows[a]] for a in ancestors]

    def truncate(self, twin):
        lengths = [self.random.randint(n // 2, n) for n in twin.lengths()]
        self.note_cuts(twin, lengths)
        twin.cache.truncate_(lengths)
        for row, n in zip(twin.rows, lengths, strict=True):
            row[:] = [layer[:n] for layer in row]

    def free(self, twin):
        rows = [r for r, n in enumerate(twin.lengths()) if n > 0 and self.random.random() < 0.5]
        twin.cache.free(rows)
        for r in rows:
            twin.rows[r] = [[] for _ in range(LAYERS)]

    def drop(self, twin):
        self.twins.remove(twin)

    def compact(self, twin):
        if not twin.even():
            return
        counts = [self.random.randint(n // 2, n) for n in twin.lengths()]
        shape = self.random.choice([(1, 1), (1, HEADS), (LAYERS, HEADS)])
        keep = torch.full((shape[0], len(twin.rows), shape[1], max(counts, default=0) + 1), -1)
        for layer in range(shape[0]):
            for r, (n, count) in enumerate(zip(twin.lengths(), counts, strict=True)):
                for head in range(shape[1]):
                    chosen = sorted(self.random.sample(range(n), count))
                    keep[layer, r, head, :count] = torch.tensor(chosen, dtype=torch.long)
        given = keep[0, :, 0] if shape == (1, 1) else keep[0] if shape[0] == 1 else keep
        self.tried(twin, lambda: twin.cache.compact_(given))
        self.note_cuts(twin, counts)
        keep = keep.expand(LAYERS, -1, HEADS, -1)
        for r, row in enumerate(twin.rows):
            for layer in range(LAYERS):
                lists, old = keep[layer, r, :, : counts[r]].T.tolist(), row[layer]
                row[layer] = [
                    tuple(
                        torch.stack([old[j][part][h] for h, j in enumerate(at)])
                        for part in range(3)
                    )
                    for at in lists
                ]

    def merge(self, twin):
        """Merged tokens are taken over as they are: test_kvcache_merging says what they must be."""
        if self.pool.key_bias is None or not twin.even():
            return
        before = twin.lengths()
        self.tried(twin, lambda: merge_similar_(twin.cache, threshold=0.99, recent=1))
        after = twin.cache.seq_lens.tolist()
        assert all(n <= old for n, old in zip(after, before, strict=True))
        self.note_cuts(twin, after)
        for r, row in enumerate(twin.rows):
            for layer in range(LAYERS):
                old, row[layer] = row[layer], self.stored(twin, r, layer, after[r])
                if old:  # as many tokens are stood for as before
                    stood = [torch.stack([x[2] for x in y]).exp().sum(0) for y in (old, row[layer])]
                    torch.testing.assert_close(*stood)

    def register(self, twin):
        for r, row in enumerate(twin.rows):
            n = min(map(len, row)) // SIZE * SIZE
            if n == 0 or self.pool.key_bias is not None:
                continue
            ids = list(range(self.next_id, self.next_id + n))
            self.next_id += n
            try:
                assert twin.cache.register_prefix(ids, row=r) == n
            except ValueError as error:
                if "registered with other tokens" not in str(error):
                    raise
                continue
            self.prefixes.append((ids, [list(layer[:n]) for layer in row]))
            return

    def match(self, twin):
        for r, row in enumerate(twin.rows):
            if any(row) or not self.prefixes:
                continue
            ids, layers = self.random.choice(self.prefixes)
            found = twin.cache.match_prefix(ids, row=r)
            assert found % SIZE == 0
            row[:] = [list(layer[:found]) for layer in layers]
            return

    def grow(self, _):
        if self.pool.num_blocks < 60 and self.random.random() < 0.2:
            self.pool.grow(self.pool.num_blocks + self.random.randint(0, 3))

    # What an exhausted pool calls.

    def evict(self, missing):
        assert missing > 0
        for twin in self.twins:
            if twin is not self.waiting and self.random.random() < 0.5:
                self.random.choice([self.free, self.truncate])(twin)

    def tried(self, twin, call):
        table, lengths = twin.cache.block_table.clone(), twin.cache.seq_lens.clone()
        self.waiting = twin
        try:
            call()
        except BlockPoolExhausted:
            assert torch.equal(twin.cache.block_table, table)
            assert torch.equal(twin.cache.seq_lens, lengths)
            raise
        finally:
            self.waiting = None
        # Copies of a block are described as it was.
        now = twin.cache.block_table
        for row, old in zip(now.tolist(), table.tolist(), strict=True):
            for block, before in zip(row, old, strict=False):
                if block >= 0 and before in self.cut:
                    self.cut.add(block)

    def note_cuts(self, twin, lengths):
        for row, n in zip(twin.cache.block_table.tolist(), lengths, strict=True):
            self.cut.update(row[n // SIZE : n // SIZE + 1])

    # What must hold.

    def stored(self, twin, r, layer, n):
        pool, j = self.pool, torch.arange(n)
        block = twin.cache.block_table[r, j // SIZE].long()
        parts = []
        for part, pages in enumerate((pool.key_pages, pool.value_pages)):
            tokens = pages[layer][block, :, j % SIZE].double()
            if pool.quantised:
                tokens = tokens * pool._scales[layer][part][block].double()[..., None]
            parts.append(tokens)
        bias = pool.key_bias
        parts.append(torch.zeros(n, HEADS) if bias is None else bias[layer][block, :, j % SIZE])
        return list(zip(*parts, strict=True))

    def same(self, ours, model, twin, r, layer):
        if not model:
            return
        j = torch.arange(len(model))
        block = twin.cache.block_table[r, j // SIZE].long()
        for part in range(3):
            mine = torch.stack([x[part] for x in ours])
            expected = torch.stack([x[part] for x in model])
            if part == 2 or not self.pool.quantised:
                assert torch.equal(mine, expected), (r, layer, part)
                continue
            scale = self.pool._scales[layer][part][block].double()[..., None]
            step = scale / 2
            if self.pool.dtype != torch.int8:
                step = expected.abs() / 16 + scale / 1024
            wrong = (mine - expected).abs() > step * 1.001
            assert not wrong.any(), (r, layer, part, mine[wrong], expected[wrong])

    def check(self):
        with self.pool._lock:
            for twin in self.twins:
                assert twin.cache.seq_lens.tolist() == twin.lengths()
                for r, row in enumerate(twin.rows):
                    for layer in range(LAYERS):
                        ours = self.stored(twin, r, layer, len(row[layer]))
                        self.same(ours, row[layer], twin, r, layer)
                        row[layer] = ours  # errors of codes do not add up in the model
                if self.pool.summaries is not None and twin.even():
                    self.check_summaries(twin)
            if self.alone:
                self.check_owners()

    def check_summaries(self, twin):
        pool, table, lengths = self.pool, twin.cache.block_table, twin.cache.seq_lens
        for layer in range(LAYERS):
            scales = {"key_scales": pool.key_scales[layer]} if pool.quantised else {}
            exact = block_summaries(
                pool.key_pages[layer], table, lengths, pool.summary_kind, **scales
            )
            ours = pool.summaries[layer][table.clamp(min=0).long()].transpose(1, 2)
            for r, row in enumerate(table.tolist()):
                for i, block in enumerate(row):
                    if block < 0:
                        continue
                    if block not in self.cut:
                        assert torch.equal(ours[r, :, i], exact[r, :, i]), (r, i, block)
                    elif pool.summary_kind == "minmax":
                        assert (ours[r, :, i, 0] <= exact[r, :, i, 0]).all()
                        assert (ours[r, :, i, 1] >= exact[r, :, i, 1]).all()

    def check_owners(self):
        owners = [0] * self.pool.num_blocks
        for twin in self.twins:
            for row, n in zip(twin.cache.block_table.tolist(), twin.lengths(), strict=True):
                held = -(-n // SIZE)
                assert all(b >= 0 for b in row[:held])
                assert all(b == -1 for b in row[held:])
                for block in row[:held]:
                    owners[block] += 1
        free = registered = 0
        for block, count in enumerate(owners):
            more = self.pool.num_owners(block) - count
            assert more in (0, 1)
            registered += more == 1 and count == 0
            free += more == 0 and count == 0
        assert self.pool.num_free_blocks == free
        assert self.pool.num_evictable_blocks == registered
        self.cut = {b for b in self.cut if b >= 0 and self.pool.num_owners(b) > 0}

    def run(self, steps):
        actions = [self.append] * 6 + [self.write] * 2 + [self.compact, self.merge] * 2
        actions += [self.fork, self.fork, self.permute, self.truncate, self.free, self.drop]
        actions += [self.register, self.match, self.grow]
        for _ in range(steps):
            if not self.twins or self.random.random() < 0.1:
                self.create()
                continue
            try:
                self.random.choice(actions)(self.random.choice(self.twins))
            except BlockPoolExhausted:
                self.refused = True
            self.check()


def make_pool(dtype, summaries, key_bias, blocks=30):
    return BlockPool(
        blocks, num_layers=LAYERS, num_kv_heads=HEADS, head_dim=DIM, value_head_dim=VALUE_DIM,
        block_size=SIZE, dtype=dtype, summaries=summaries, key_bias=key_bias,
    )  # fmt: skip


DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.int8, torch.float8_e4m3fn]
KINDS = [("minmax", True), ("mean", False), (None, True), ("mean", True), ("minmax", False)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("number", range(5))
def test_any_combination(dtype, number):
    pool = make_pool(dtype, *KINDS[number])
    fuzz = Fuzz(number, pool)
    if number % 2 == 0:
        pool.add_eviction_hook(fuzz.evict)
    fuzz.run(120)
    fuzz.twins.clear()
    assert pool.num_free_blocks + pool.num_evictable_blocks == pool.num_blocks


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8], ids=str)
def test_any_combination_in_threads(dtype):
    """Each with caches of its own, on one pool that runs short."""
    pool = make_pool(dtype, "minmax", True, blocks=40)
    errors = []

    def work(seed):
        try:
            fuzz = Fuzz(seed, pool, alone=False)
            fuzz.run(120)
            fuzz.twins.clear()
        except BaseException as error:  # noqa: BLE001
            errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert pool.num_free_blocks == pool.num_blocks
