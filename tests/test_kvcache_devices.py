"""A pool whose tables are copied to its device, against one whose kernels read the host's tables.

Without a GPU the copies stay on the host, in memory of their own, so that a missing one shows.
"""

from __future__ import annotations

import random

import pytest
import torch

import torch_winnow
from torch_winnow._kvcache import mirror
from torch_winnow.kvcache import BlockPool, BlockPoolExhausted, PagedKVCache, paged_attention

HAS_GPU = torch.cuda.is_available() and torch_winnow.build_info().cuda_library
LAYERS, HEADS, DIM, BLOCK = 2, 2, 8, 4


@pytest.fixture(
    params=["copies", pytest.param("cuda", marks=pytest.mark.skipif(not HAS_GPU, reason="no GPU"))]
)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    if request.param == "cuda":
        return torch.device("cuda")
    monkeypatch.setattr(mirror, "is_apart", lambda device: True)
    return torch.device("cpu")


def make_pool(device: torch.device, blocks: int = 40) -> BlockPool:
    return BlockPool(
        blocks,
        num_layers=LAYERS,
        num_kv_heads=HEADS,
        head_dim=DIM,
        block_size=BLOCK,
        dtype=torch.float32,
        device=device,
        summaries="minmax",
        key_bias=True,
    )


def history(device: torch.device, seed: int, steps: int = 80):
    """Operations on caches of a pool; yields what a kernel would read after each."""
    dice, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    pool = make_pool(device)
    caches = [PagedKVCache(pool, 3)]

    def states(tokens: int) -> torch.Tensor:
        return torch.randn(3, HEADS, tokens, DIM, generator=generator).to(device)

    for _ in range(steps):
        cache = dice.choice(caches)
        move = dice.choice(
            ["append"] * 4 + ["write", "fork", "permute", "cut", "free", "grow", "drop"]
        )
        try:
            if move == "append":
                key, value = states(tokens := dice.randrange(4)), states(tokens)
                lengths = dice.choice([None, [tokens, 0, tokens // 2]])
                for layer in range(LAYERS):
                    cache.append(layer, key + layer, value, lengths=lengths)
            elif move == "write" and int(cache.seq_lens.min()):
                at = [[dice.randrange(int(n)) for _ in range(2)] for n in cache.seq_lens]
                key = states(2)
                for layer in range(LAYERS):
                    cache.write(layer, key + layer, -key, torch.tensor(at))
            elif move == "fork" and len(caches) < 3:
                caches.append(cache.fork([dice.randrange(3) for _ in range(3)]))
            elif move == "permute":
                cache.permute_([dice.randrange(3) for _ in range(3)])
            elif move == "cut":
                cache.truncate_([dice.randrange(int(n) + 1) for n in cache.seq_lens])
            elif move == "drop":
                keep = [[p if p < int(n) else -1 for p in range(1, 40, 2)] for n in cache.seq_lens]
                cache.compact_(torch.tensor(keep))
            elif move == "free":
                cache.free([0])
            elif move == "grow":
                pool.grow(pool.num_blocks + 1)
        except (BlockPoolExhausted, ValueError) as error:  # ValueError: freed twice
            yield str(error)
        query = states(1)
        pages = pool.key_pages[1], pool.value_pages[1]
        tables = cache.block_table, cache.seq_lens
        out = paged_attention(query, *pages, *tables, key_bias=pool.key_bias[1])
        used = pool.summaries[1, cache.block_table.clamp(min=0).long()]
        yield tuple(x.cpu().clone() for x in (*tables, out, used))


def agree(steps, expected) -> None:
    for step, wanted in zip(steps, expected, strict=True):
        if isinstance(step, str):
            assert step == wanted
            continue
        assert torch.equal(step[0], wanted[0])
        assert torch.equal(step[1], wanted[1])
        for result, definition in zip(step[2:], wanted[2:], strict=True):
            torch.testing.assert_close(result, definition, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_tables_follow_the_host(device, seed):
    steps = list(history(device, seed))
    with pytest.MonkeyPatch.context() as plain:
        plain.setattr(mirror, "is_apart", lambda device: False)
        agree(steps, list(history(torch.device("cpu"), seed)))


def test_kernels_of_a_gpu_read_these_tables(request, monkeypatch):
    expected = list(history(torch.device("cpu"), 7, 25))
    gpu = request.getfixturevalue("gpu")
    monkeypatch.setattr(mirror, "is_apart", lambda device: True)
    agree(list(history(gpu, 7, 25)), expected)


def test_layers_of_a_step_share_their_positions(device, monkeypatch):
    copies = []
    staged = mirror.pinned

    def counted(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        copies.append(tuple(tensor.shape))
        return staged(tensor, device)

    cache = PagedKVCache(make_pool(device), 3)
    monkeypatch.setattr(mirror, "pinned", counted)
    key = torch.randn(3, HEADS, 1, DIM, device=device)
    for _ in range(2):
        for layer in range(LAYERS):
            cache.append(layer, key, key)
    # Two steps: table, lengths and positions, once each.
    assert copies == [(3, 1), (3,), (3, 1)] * 2


def test_what_was_sent_stays_as_it_was(device):
    """The host goes on while the device may not have started: nothing it reads may change."""
    pool = make_pool(device)
    cache = PagedKVCache(pool, 3)
    key = torch.randn(3, HEADS, 1, DIM, device=device)
    cache.append(0, key, key)
    assert cache.block_table.device == cache.seq_lens.device == pool.device
    native = cache._mirror
    assert native.lengths.data_ptr() != native._host_lengths.data_ptr()
    assert native.table.data_ptr() != native._host_table.data_ptr()
    assert native._staged.data_ptr() != cache._positions.data_ptr()


@pytest.mark.skipif(not HAS_GPU, reason="no GPU")
def test_nothing_waits_for_the_gpu():
    cache = PagedKVCache(make_pool(torch.device("cuda")), 3)
    key = torch.randn(3, HEADS, 5, DIM, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        for layer in range(LAYERS):
            cache.append(layer, key, key)
        twin = cache.fork([0, 0, 1])
        cache.write(0, key[:, :, :1], key[:, :, :1], torch.zeros(3, 1, dtype=torch.int64))
        twin.append(0, key, key)
        cache.permute_([2, 1, 0])
        cache.truncate_([1, 2, 3])
        cache.free([0])
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_machine_without_a_gpu_says_so():
    with pytest.raises(ValueError, match="device: torch finds no GPU here: expected cpu, got cuda"):
        make_pool(torch.device("cuda"))
