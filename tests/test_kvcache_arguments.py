"""Arguments of the wrong type: a ValueError names the argument and nothing changes."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch

from torch_winnow.kvcache import BlockPool, PagedKVCache

SIZES = {"num_blocks": 8, "num_layers": 2, "num_kv_heads": 1, "head_dim": 4, "block_size": 4}
HUGE = 2**63


def make_cache(rows=2, length=3):
    cache = PagedKVCache(BlockPool(**SIZES, dtype=torch.float32), rows)
    cache.append(0, *torch.randn(2, rows, 1, length, 4))
    return cache


@pytest.mark.parametrize("argument", [*SIZES, "value_head_dim"])
@pytest.mark.parametrize("wrong", ["a", 4.5, [4], torch.tensor(4.0), True, HUGE], ids=str)
def test_sizes_of_a_pool_are_integers(argument, wrong):
    with pytest.raises(ValueError, match=rf"^{argument}: expected an integer"):
        BlockPool(**{**SIZES, argument: wrong}, dtype=torch.float32)


@pytest.mark.parametrize("wrong", ["a", 1.5, None, -HUGE - 1], ids=str)
def test_a_cache_needs_a_pool_and_a_batch_size(wrong):
    pool = BlockPool(**SIZES, dtype=torch.float32)
    with pytest.raises(ValueError, match="^batch_size: expected an integer"):
        PagedKVCache(pool, wrong)
    with pytest.raises(ValueError, match="^pool: expected a BlockPool, got "):
        PagedKVCache(wrong, 1)
    with pytest.raises(ValueError, match="^block: expected an integer"):
        pool.num_owners(wrong)


LISTS = {
    "fork": (lambda cache, rows: cache.fork(rows), "parents"),
    "permute_": (lambda cache, rows: cache.permute_(rows), "ancestors"),
    "truncate_": (lambda cache, rows: cache.truncate_(rows), "lengths"),
    "free": (lambda cache, rows: cache.free(rows), "rows"),
    "append": (
        lambda cache, rows: cache.append(0, *torch.zeros(2, 2, 1, 1, 4), lengths=rows),
        "lengths",
    ),
}


@pytest.mark.parametrize("method", LISTS)
@pytest.mark.parametrize(
    "wrong",
    [0, 0.5, [0, 0.5], "01", [None, 0], [[0], [0]], [True, False], [0, HUGE]]
    + [torch.tensor(0), torch.tensor([0.0, 1.0]), torch.tensor([True, False])]
    + [torch.zeros(2, dtype=torch.complex64), torch.zeros(0, 2), np.array([0.0, 1.0])],
    ids=repr,
)
def test_lists_hold_integers(method, wrong):
    refused(method, wrong)


@pytest.mark.parametrize("method", [name for name in LISTS if name != "append"])
def test_lists_are_given(method):  # append takes all tokens without lengths
    refused(method, None)


def refused(method, wrong):
    call, argument = LISTS[method]
    cache = make_cache()
    table, free = cache.block_table.clone(), cache.pool.num_free_blocks
    with pytest.raises(ValueError, match=rf"^{argument}(\[\d\])?: expected "):
        call(cache, wrong)
    assert torch.equal(cache.block_table, table)
    assert cache.seq_lens.tolist() == [3, 3]
    assert cache.pool.num_free_blocks == free


@pytest.mark.parametrize(
    "rows",
    [[1, 0], (1, 0), range(1, -1, -1), np.array([1, 0]), [np.int32(1), torch.tensor(0)]]
    + [torch.tensor([1, 0], dtype=dtype) for dtype in (torch.int32, torch.uint8)],
    ids=repr,
)
def test_every_kind_of_integers_is_taken(rows):
    cache = make_cache()
    assert torch.equal(cache.fork(rows).block_table, cache.block_table.flip(0))


@pytest.mark.parametrize("empty", [[], (), torch.tensor([]), torch.tensor([]).long()], ids=repr)
def test_nothing_may_come_in_any_dtype(empty):
    cache = PagedKVCache(BlockPool(**SIZES, dtype=torch.float32), 0)
    cache.truncate_(empty)
    cache.permute_(empty)
    cache.free(empty)
    assert cache.fork(empty).batch_size == 0
    assert make_cache().fork(empty).batch_size == 0
    with pytest.raises(ValueError, match="lengths: expected one per row, 2, got 0"):
        make_cache().truncate_(empty)


@pytest.mark.parametrize("method", ["append", "write"])
def test_tokens_are_tensors_and_a_layer_an_integer(method):
    cache = make_cache()
    key, value = torch.zeros(2, 2, 1, 1, 4)
    where = [torch.zeros(2, 1, dtype=torch.int64)] if method == "write" else []
    call = getattr(cache, method)
    for wrong in ("a", 0.5, None, [0], HUGE):
        with pytest.raises(ValueError, match="^layer: expected an integer"):
            call(wrong, key, value, *where)
    with pytest.raises(ValueError, match="^key: expected a tensor, got None"):
        call(0, None, value, *where)
    with pytest.raises(ValueError, match="^value: expected a tensor, got 'v'"):
        call(0, key, "v", *where)
    call(np.int64(1), key, value, *where)


@pytest.mark.parametrize("wrong", [[[0], [0]], None, 0], ids=repr)
def test_positions_are_a_tensor(wrong):
    with pytest.raises(ValueError, match=r"^positions: expected a \(2, 1\) int32 or int64 tensor"):
        make_cache().write(0, *torch.zeros(2, 2, 1, 1, 4), wrong)


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, pickle.dumps])
def test_copies_are_refused_and_fork_is_named(duplicate):
    cache = make_cache()
    with pytest.raises(TypeError, match=r"fork\(range\(batch_size\)\)"):
        duplicate(cache)
    twin = cache.fork(range(cache.batch_size))  # what the message advises
    twin.append(0, *torch.zeros(2, 2, 1, 1, 4))
    assert (cache.seq_lens.tolist(), twin.seq_lens.tolist()) == ([3, 3], [4, 4])
