"""Arguments of the wrong type: a ValueError names the argument and nothing changes."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch

from test_kvcache_storage import make_pool, tokens
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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": 0}, "num_layers: expected at least 1, got 0"),
        ({"block_size": 0}, "block_size: expected at least 1, got 0"),
        ({"value_head_dim": -1}, "value_head_dim: expected at least 1, got -1"),
        ({"dtype": torch.uint8}, "dtype: expected float32, bfloat16.*got torch.uint8"),
        ({"device": "meta"}, "device: expected cpu or cuda, got meta"),
        ({"blocks": -1}, "num_blocks: expected 0 <= num_blocks.*got -1"),
    ],
)
def test_pool_errors_name_the_argument(options, message):
    with pytest.raises(ValueError, match=message):
        make_pool(**options)


def test_cache_errors_name_the_argument_and_change_nothing():
    pool = make_pool(layers=2)
    with pytest.raises(ValueError, match="batch_size: expected at least 0, got -1"):
        PagedKVCache(pool, -1)
    cache = PagedKVCache(pool, 2)
    key, value = tokens(2, 5)
    cache.append(0, key, value)
    where = torch.zeros(2, 5, dtype=torch.int64)
    cases = [
        (lambda: cache.append(2, key, value), r"layer: expected 0 <= layer < 2, got 2"),
        (lambda: cache.append(-1, key, value), r"layer: expected .* got -1"),
        (lambda: cache.append(0, key[:1], value), r"key: expected .*\(2, 2, T, 4\), got \(1, 2, 5"),
        (lambda: cache.append(0, key[0], value), r"key: expected .* got \(2, 5, 4\)"),
        (lambda: cache.append(0, key, value[:, :, :4]), r"value: expected .*\(2, 2, 5, 4\), got"),
        (lambda: cache.append(0, key.half(), value), r"key: expected torch.float32.*torch.float16"),
        (lambda: cache.append(0, key, value.to("meta")), r"value: expected .* on meta"),
        (lambda: cache.append(0, key.mT.contiguous().mT, value), r"key: the last dimension must"),
        (
            lambda: cache.append(0, key, value.clone().requires_grad_()),
            r"value: requires a gradient",
        ),
        (
            lambda: cache.append(0, key, value, lengths=[6, 0]),
            r"lengths: expected 0 <= length <= 5",
        ),
        (
            lambda: cache.append(0, key, value, lengths=[1]),
            r"lengths: expected one per row, 2, got 1",
        ),
        (lambda: cache.write(0, key, value, where[:, :4]), r"positions: expected \(2, 5\)"),
        (lambda: cache.write(0, key, value, where.float()), r"positions: expected .*int64, got"),
        (lambda: cache.write(0, key, value, where + 5), r"positions: .* < 5 .*row 0.*got 5"),
        (lambda: cache.write(0, key, value, where - 1), r"positions: expected .*got -1"),
        (lambda: cache.write(2, key, value, where), r"layer: expected"),
        (lambda: cache.fork([0, 2]), r"parents: expected 0 <= parent < 2, got 2"),
        (lambda: cache.fork(torch.zeros(2, 1).long()), r"parents: expected a one-dimensional"),
        (lambda: cache.permute_([0]), r"ancestors: expected one per row, 2, got 1"),
        (lambda: cache.permute_([0, -1]), r"ancestors: expected 0 <= ancestor < 2, got -1"),
        (lambda: cache.permute_(torch.zeros(2)), r"ancestors: expected .*integer tensor"),
        (lambda: cache.truncate_([5, 6]), r"lengths: .* <= 5 \(the length of row 1\), got 6"),
        (lambda: cache.truncate_([-1, 5]), r"lengths: expected .*got -1"),
        (lambda: cache.free([2]), r"rows: expected 0 <= row < 2, got 2"),
    ]
    table, pages = cache.block_table.clone(), pool.key_pages.clone()
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()
        assert torch.equal(cache.block_table, table)
        assert torch.equal(pool.key_pages, pages)
        assert cache.seq_lens.tolist() == [5, 5]
        assert pool.num_free_blocks == 12
    with torch.no_grad():  # a model's activations, in inference
        cache.append(0, key.clone().requires_grad_(), value)
