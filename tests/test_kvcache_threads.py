"""Threads with caches of their own on one pool: nobody's keys change, and no block is lost."""

from __future__ import annotations

import gc
import random
import sys
import threading

import pytest
import torch

from torch_winnow.kvcache import BlockPool, BlockPoolExhausted, PagedKVCache

LAYERS, BLOCK, THREADS = 2, 4, 4
PROMPT = list(range(10))


def states(tokens: list[int]) -> torch.Tensor:
    return torch.tensor(tokens, dtype=torch.float64).view(1, 1, -1, 1)


def append(cache: PagedKVCache, tokens: list[int]) -> None:
    for layer in range(LAYERS):
        cache.append(layer, states(tokens) + layer, -states(tokens))


def holds(cache: PagedKVCache, tokens: list[int]) -> None:
    pool, where = cache.pool, torch.arange(len(tokens))
    assert cache.seq_lens.tolist() == [len(tokens)]
    blocks, expected = cache.block_table[0, where // BLOCK].long(), states(tokens).flatten()
    for layer in range(LAYERS):
        assert torch.equal(pool.key_pages[layer, blocks, 0, where % BLOCK, 0], expected + layer)
        assert torch.equal(pool.value_pages[layer, blocks, 0, where % BLOCK, 0], -expected)


@pytest.fixture(autouse=True)
def _switch_often():
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def run_in_threads(work) -> None:
    """Runs work(0), ..., at once; the first error is the test's."""
    errors = []
    start = threading.Barrier(THREADS)

    def guarded(name: int) -> None:
        start.wait()
        try:
            work(name)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(name,)) for name in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def test_many_threads_on_one_pool():
    pool = BlockPool(
        20, num_layers=LAYERS, num_kv_heads=1, head_dim=1, block_size=BLOCK, dtype=torch.float64
    )
    system = PagedKVCache(pool, 1)
    append(system, PROMPT)
    system.register_prefix(PROMPT)
    exhausted = []

    def work(name: int) -> None:
        dice = random.Random(name)
        rows: list[tuple[PagedKVCache, list[int]]] = []
        for step in range(150):
            if len(rows) < 2 or (len(rows) < 4 and dice.random() < 0.3):
                if dice.random() < 0.5:
                    rows.append((system.fork([0]), list(PROMPT)))  # all threads fork this cache
                else:
                    cache = PagedKVCache(pool, 1)
                    rows.append((cache, PROMPT[: cache.match_prefix(PROMPT)]))
            cache, tokens = rows.pop(dice.randrange(len(rows)))
            move = dice.choice(["append", "append", "write", "fork", "cut", "drop"])
            new = [1000 * (name + 1) + step] * dice.randrange(1, 5)
            try:
                if move == "append":
                    append(cache, new)
                    tokens += new
                elif move == "write" and tokens:
                    at = dice.randrange(len(tokens))
                    for layer in range(LAYERS):
                        where = torch.tensor([[at]])
                        cache.write(layer, states(new[:1]) + layer, -states(new[:1]), where)
                    tokens[at] = new[0]
                elif move == "fork":
                    rows.append((cache.fork([0]), list(tokens)))
                elif move == "cut":
                    tokens = tokens[: dice.randrange(len(tokens) + 1)]
                    cache.truncate_([len(tokens)])
            except BlockPoolExhausted as error:
                exhausted.append(error.needed)
                move = "drop"  # a layer may have stored what the other could not
            if move != "drop":
                rows.append((cache, tokens))
            del cache
            for held, expected in rows:
                holds(held, expected)

    run_in_threads(work)
    assert exhausted
    holds(system, PROMPT)
    system.free([0])
    gc.collect()
    assert pool.num_free_blocks + pool.num_evictable_blocks == pool.num_blocks


def test_a_block_is_copied_before_its_other_owner_writes():
    """Two owners of a block overwrite it at the same moment: one of them copies it first."""
    pool = BlockPool(
        8, num_layers=LAYERS, num_kv_heads=1, head_dim=1, block_size=64, dtype=torch.float64
    )
    for round_ in range(100):
        root = PagedKVCache(pool, 1)
        append(root, [7] * 64)
        caches = [root.fork([0]) for _ in range(THREADS)]
        del root

        def work(name: int, caches=caches, round_=round_) -> None:
            new = states([100 * round_ + name])
            for layer in range(LAYERS):
                caches[name].write(layer, new + layer, -new, torch.tensor([[name]]))

        run_in_threads(work)
        for name, cache in enumerate(caches):
            expected = states([7] * 64)
            expected[0, 0, name] = 100 * round_ + name
            block = int(cache.block_table[0, 0])
            assert torch.equal(pool.key_pages[1, block, 0], expected[0, 0] + 1)
        del caches, cache, work
    assert pool.num_free_blocks == 8


def test_a_pool_that_grows_meanwhile_loses_no_token():
    pool = BlockPool(
        4, num_layers=LAYERS, num_kv_heads=1, head_dim=1, block_size=BLOCK, dtype=torch.float64
    )
    pool.add_eviction_hook(lambda missing: pool.grow(pool.num_blocks + missing))

    def work(name: int) -> None:
        cache, tokens = PagedKVCache(pool, 1), []
        for step in range(40):
            new = [100 * name + step, step]
            while True:  # another thread may take what the hook made, or grow the pool further
                try:
                    append(cache, new)
                    break
                except (BlockPoolExhausted, ValueError):
                    cache.truncate_([len(tokens)])
            tokens += new
            holds(cache, tokens)

    run_in_threads(work)
    assert pool.num_blocks >= 4 * THREADS
    assert pool.num_free_blocks == pool.num_blocks


def test_hooks_of_several_threads():
    """Each thread's hook gives up an idle cache of its own; nobody waits for the others."""
    # What one thread needs at once is more than there is.
    pool = BlockPool(
        3, num_layers=LAYERS, num_kv_heads=1, head_dim=1, block_size=BLOCK, dtype=torch.float64
    )
    idle = threading.local()
    asked = []

    def hook(missing: int) -> None:
        asked.append(missing)
        idle.cache = None

    pool.add_eviction_hook(hook)

    def work(name: int) -> None:
        for step in range(30):
            idle.cache = None
            cache = PagedKVCache(pool, 1)
            try:
                append(cache, [name] * BLOCK)
                idle.cache = PagedKVCache(pool, 1)
                append(idle.cache, [step] * 2 * BLOCK)
                append(cache, [step] * BLOCK)
            except BlockPoolExhausted:
                continue
            holds(cache, [name] * BLOCK + [step] * BLOCK)

    run_in_threads(work)
    assert asked
    assert pool.num_free_blocks == 3
