"""paged_attention against its definition, and at its edges."""

from __future__ import annotations

import pytest
import torch

from conftest import TOLERANCE
from torch_winnow import reference
from torch_winnow.kvcache import paged_attention

INF = float("inf")


def make(
    lengths,
    *,
    heads=(4, 2),
    queries=1,
    dim=32,
    value_dim=None,
    block_size=16,
    dtype=torch.float32,
    spare=3,
    order=None,
    device="cpu",
):
    """query, key_pages, value_pages, block_table, seq_lens; blocks scattered over the pool."""
    value_dim = dim if value_dim is None else value_dim
    counts = [-(-length // block_size) for length in lengths]
    blocks = sum(counts) + spare
    places = torch.randperm(blocks) if order is None else order
    table = torch.full((len(lengths), max(counts, default=0) + 1), -1, dtype=torch.int32)
    used = 0
    for row, count in enumerate(counts):
        table[row, :count] = places[used : used + count]
        used += count
    return (
        torch.randn(len(lengths), heads[0], queries, dim).to(device, dtype),
        torch.randn(blocks, heads[1], block_size, dim).to(device, dtype),
        torch.randn(blocks, heads[1], block_size, value_dim).to(device, dtype),
        table.to(device),
        torch.tensor(lengths, dtype=torch.int32, device=device),
    )


def check(inputs, **options):
    query, key, value, table, lengths = inputs
    out, lse = paged_attention(*inputs, return_lse=True, **options)
    assert out.dtype == query.dtype
    assert lse.dtype == (torch.float64 if query.dtype == torch.float64 else torch.float32)
    expected, expected_lse = reference.paged_attention(
        query.double(), key.double(), value.double(), table, lengths, return_lse=True, **options
    )
    torch.testing.assert_close(out.double(), expected, **TOLERANCE[query.dtype], equal_nan=True)
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    torch.testing.assert_close(lse.double(), expected_lse, **TOLERANCE[wide], equal_nan=True)
    return out, lse


SHAPES = {
    "decode": {"lengths": [40, 7, 64]},
    "long": {"lengths": [2500], "heads": (4, 1), "dim": 16},
    "several queries": {"lengths": [33, 5], "queries": 5},
    "prefill": {"lengths": [70, 40], "queries": 40, "heads": (6, 2)},
    "no grouping": {"lengths": [50], "heads": (3, 3)},
    "one key head": {"lengths": [50], "heads": (7, 1)},
    "odd dimensions": {"lengths": [21], "dim": 37, "value_dim": 19},
    "tiny dimensions": {"lengths": [21], "dim": 1, "value_dim": 3, "queries": 3},
    "wide values": {"lengths": [21], "dim": 80, "value_dim": 256},
    "wide keys": {"lengths": [30], "dim": 256, "value_dim": 16, "queries": 2},
    "blocks of one": {"lengths": [9], "block_size": 1},
    "odd blocks": {"lengths": [29], "block_size": 7, "queries": 3},
    "large blocks": {"lengths": [300, 100], "block_size": 200},
    "more queries than keys": {"lengths": [3, 0], "queries": 6},
    "empty rows": {"lengths": [0, 12, 0]},
    "no rows": {"lengths": []},
    "no queries": {"lengths": [5], "queries": 0},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_matches_definition(shape, dtype, device):
    check(make(**SHAPES[shape], dtype=dtype, device=device))


@pytest.mark.parametrize("shape", ["decode", "prefill", "odd dimensions", "empty rows"])
def test_float64(shape):
    check(make(**SHAPES[shape], dtype=torch.float64))


@pytest.mark.parametrize(
    "options",
    [
        {"causal": False},
        {"window": 1},
        {"window": 9},
        {"window": 9, "sinks": 3},
        {"window": 2**60, "sinks": 2**60},
        {"window": 5, "causal": False},
        {"window": 5, "sinks": 18, "causal": False},
        {"sinks": 4},
        {"scale": 0.3},
        {"scale": 0.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("queries", [1, 14])
def test_options(options, queries, cpu_capability):
    check(make([50, 33, 4], queries=queries), **options)
    check(make([50, 33, 4], queries=queries, dtype=torch.bfloat16), **options)


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("queries", [1, 20])
def test_block_indices(per_head, queries, cpu_capability):
    inputs = make([90, 33, 4], queries=queries)
    shared = [[0, 2, 3, -1], [1, -1, -1, -1], [-1, -1, -1, -1]]
    other = [[1, 2, 4, 5], [0, -1, 2, -1], [0, -1, -1, -1]]
    named = torch.tensor([shared, other], dtype=torch.int32).transpose(0, 1)
    indices = named if per_head else named[:, 0]
    check(inputs, block_indices=indices)
    check(inputs, block_indices=indices, causal=False)
    check(inputs, block_indices=indices, window=30, sinks=5)
    check(inputs, block_indices=indices[..., :0])


def test_all_blocks_named_is_all_blocks():
    inputs = make([2000, 700], block_size=16)
    named = torch.arange(125, dtype=torch.int32).expand(2, -1).clone()
    named[1, 44:] = -1
    assert torch.equal(paged_attention(*inputs, block_indices=named), paged_attention(*inputs))


@pytest.mark.parametrize("bias_shape", [(9, 2, 16), (1, 2, 1), (2, 16), (16,), (), (9, 1, 1)])
@pytest.mark.parametrize("bias_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_key_bias(bias_shape, bias_dtype, cpu_capability):
    inputs = make([50, 20], queries=3, spare=3)
    assert inputs[1].shape[0] == 9
    bias = torch.randn(bias_shape).to(bias_dtype)
    check(inputs, key_bias=bias)
    check(tuple(t.double() if t.is_floating_point() else t for t in inputs), key_bias=bias.double())
    check(tuple(t.double() if t.is_floating_point() else t for t in inputs), key_bias=bias)


def test_key_bias_strided():
    inputs = make([50, 20], spare=3)
    check(inputs, key_bias=torch.randn(9, 16, 2).transpose(1, 2))


def test_bias_is_a_multiplicity(dtype):
    """A key that stands for three equals three equal keys, and -inf is no key."""
    query, key, value, table, _ = make([16], dtype=dtype, spare=0)
    key[:, :, 1:3] = key[:, :, :1]
    value[:, :, 1:3] = value[:, :, :1]
    lengths = torch.tensor([16], dtype=torch.int32)
    bias = torch.zeros(16)
    bias[0] = torch.tensor(3.0).log()
    bias[1:3] = -INF
    merged = paged_attention(query, key, value, table, lengths, key_bias=bias)
    full = paged_attention(query, key, value, table, lengths)
    torch.testing.assert_close(merged, full, **TOLERANCE[dtype])


@pytest.mark.parametrize("queries", [1, 3, 9])
@pytest.mark.parametrize("poison", [float("nan"), INF, -INF])
def test_hidden_values_never_reach_a_result(queries, poison, dtype, cpu_capability):
    query, key, value, table, lengths = make([45], queries=queries, dtype=dtype)
    options = {"window": 12, "sinks": 2, "key_bias": torch.zeros(key.shape[0], 1, 16)}
    blocks = table[0].long()
    hidden = [(int(blocks[1]), 3), (int(blocks[2]), 14), (int(blocks[2]), 15), (int(blocks[0]), 9)]
    options["key_bias"][blocks[2], 0, 4] = -INF  # position 36
    clean = paged_attention(query, key, value, table, lengths, return_lse=True, **options)
    for block, slot in [*hidden, (int(blocks[2]), 4)]:
        key[block, :, slot] = poison
        value[block, :, slot] = poison
    key[~torch.isin(torch.arange(key.shape[0]), blocks)] = poison
    value[~torch.isin(torch.arange(key.shape[0]), blocks)] = poison
    dirty = paged_attention(query, key, value, table, lengths, return_lse=True, **options)
    assert torch.equal(clean[0], dirty[0])
    assert torch.equal(clean[1], dirty[1])


def test_causally_hidden_values_never_reach_a_result(dtype, cpu_capability):
    """Masks that differ between the rows of one tile."""
    query, key, value, table, lengths = make([20], queries=20, dtype=dtype)
    clean = paged_attention(query, key, value, table, lengths)
    key[table[0, 0].long(), :, 11] = float("nan")
    value[table[0, 0].long(), :, 11] = INF
    dirty = paged_attention(query, key, value, table, lengths)
    assert torch.equal(clean[:, :, :11], dirty[:, :, :11])
    assert dirty[:, :, 11:].isnan().all()


def test_nan_and_infinity_that_are_seen_show(dtype, cpu_capability):
    inputs = make([20], dtype=dtype)
    block = inputs[3][0, 0].long()
    inputs[2][block, :, 3, 5] = INF
    out = paged_attention(*inputs)
    assert (out[..., 5] == INF).all()
    assert out[..., 6].isfinite().all()
    inputs[1][block, :, 3] = float("nan")
    out, lse = paged_attention(*inputs, return_lse=True)
    assert out.isnan().all()
    assert lse.isnan().all()
    inputs[1][:] = float("nan")  # no score at all
    out, lse = paged_attention(*inputs, return_lse=True)
    assert out.isnan().all()
    assert lse.isnan().all()


def test_huge_scores(cpu_capability):
    query, key, value, table, lengths = make([40], queries=4)
    out, lse = check((query * 1e4, key * 1e4, value, table, lengths))
    assert out.isfinite().all()
    assert lse.isfinite().all()
    check((query * 1e-30, key * 1e-30, value * 1e30, table, lengths))


def test_strided_views(dtype):
    query, key, value, table, lengths = make([40, 12], queries=3, dtype=dtype)
    expected = paged_attention(query, key, value, table, lengths)
    wide = torch.randn(2, 3, 4, 40).to(dtype)
    strided_query = wide.transpose(1, 2)[..., 5:37].copy_(query)
    pages = torch.randn(16, key.shape[0], 2, 70).to(dtype)  # slots outermost
    strided_key = pages.permute(1, 2, 0, 3)[..., 3:35].copy_(key)
    strided_value = pages.permute(1, 2, 0, 3)[..., 37:69].copy_(value)
    wide_table = torch.full((4, 9), -7, dtype=torch.int32)
    strided_table = wide_table[::2, : table.shape[1]].copy_(table)
    wide_lengths = torch.full((2, 1), 9, dtype=torch.int32)
    strided_lengths = wide_lengths[:, 0].copy_(lengths)
    result = paged_attention(
        strided_query, strided_key, strided_value, strided_table, strided_lengths
    )
    assert torch.equal(result, expected)


@pytest.mark.parametrize("queries", [1, 30])
def test_placement_and_threads_change_nothing(queries, dtype, on_thread_counts):
    """Bitwise: where blocks lie, what else is in the batch, how many threads there are."""
    lengths = [3000, 170, 1]
    query, key, value, table, seq_lens = make(lengths, queries=queries, dtype=dtype)
    expected = paged_attention(query, key, value, table, seq_lens, return_lse=True)
    moved = torch.randperm(key.shape[0])
    new_key, new_value = torch.empty_like(key), torch.empty_like(value)
    new_key[moved], new_value[moved] = key, value
    new_table = torch.where(table < 0, table, moved.int()[table.long()])
    results = on_thread_counts(
        lambda: paged_attention(query, new_key, new_value, new_table, seq_lens, return_lse=True)
    )
    for out, lse in results:
        assert torch.equal(out, expected[0])
        assert torch.equal(lse, expected[1])
    alone = paged_attention(query[:1], key, value, table[:1], seq_lens[:1])
    assert torch.equal(alone, expected[0][:1])


def test_instruction_sets_agree(dtype, on_every_capability):
    inputs = make([1500, 70], queries=2, dtype=dtype)
    results = on_every_capability(lambda: paged_attention(*inputs))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], **TOLERANCE[dtype])


def test_partial_attentions_merge():
    """lse over disjoint blocks combines to the whole."""
    inputs = make([64], block_size=16)
    parts = [
        paged_attention(
            *inputs, block_indices=torch.tensor([b], dtype=torch.int32), return_lse=True
        )
        for b in ([0, 2], [1, 3])
    ]
    lses = torch.stack([lse for _, lse in parts])
    weights = (lses - lses.logsumexp(0)).exp()[..., None]
    merged = (weights * torch.stack([out for out, _ in parts])).sum(0)
    torch.testing.assert_close(merged, paged_attention(*inputs))


@pytest.mark.parametrize("per_head", [False, True])
def test_opcheck_and_compile(per_head):
    query, key, value, table, lengths = make([40, 12])
    named = torch.tensor([[0, 2], [0, -1]], dtype=torch.int32)
    named = named[:, None].expand(2, 2, 2) if per_head else named
    bias = torch.randn(16)
    torch.library.opcheck(
        torch.ops.winnow.paged_attention.default,
        (query, key, value, table, lengths, True, named, 9, 1, bias, 0.5),
    )
    compiled = torch.compile(paged_attention, fullgraph=True)
    options = {"block_indices": named, "window": 20, "key_bias": bias, "return_lse": True}
    for result, expected in zip(
        compiled(query, key, value, table, lengths, **options),
        paged_attention(query, key, value, table, lengths, **options),
        strict=True,
    ):
        assert torch.equal(result, expected)


BAD = {
    "query dim": ({"query": torch.randn(2, 4, 32)}, r"query: expected \(B, Hq, T, D\), got shape"),
    "query dtype": ({"query": torch.ones(2, 4, 1, 32).long()}, r"query: expected float32.*int64"),
    "query heads": ({"query": torch.randn(2, 3, 1, 32)}, r"query: .*key heads \(2\), got 3"),
    "query stride": ({"query": torch.randn(2, 4, 1, 64)[..., ::2]}, r"query: the last dimension"),
    "key dtype": ({"key_pages": torch.randn(9, 2, 16, 32).half()}, r"key_pages: expected float32"),
    "key dim": ({"key_pages": torch.randn(1, 9, 2, 16, 32)}, r"key_pages: expected the pages of"),
    "key D": ({"key_pages": torch.randn(9, 2, 16, 16)}, r"key_pages: .*D=32 as in query"),
    "values": ({"value_pages": torch.randn(9, 2, 8, 32)}, r"value_pages: expected \(num_blocks"),
    "table dtype": ({"block_table": torch.zeros(2, 3).long()}, r"block_table: expected int32"),
    "table rows": ({"block_table": torch.zeros(3, 3).int()}, r"block_table: .*B=2 as in query"),
    "foreign": ({"block_table": torch.full((2, 4), 9).int()}, r"block_table: .*< 9 in.*got 9"),
    "missing": ({"block_table": torch.full((2, 4), -1).int()}, r"block_table: .*got -1 at 0"),
    "length": ({"seq_lens": torch.tensor([65, 1]).int()}, r"seq_lens: .*<= 64.*got 65 in row 0"),
    "negative": ({"seq_lens": torch.tensor([-1, 1]).int()}, r"seq_lens: .*got -1"),
    "lens dtype": ({"seq_lens": torch.tensor([1, 1])}, r"seq_lens: expected int32, got int64"),
    "lens shape": ({"seq_lens": torch.tensor([1]).int()}, r"seq_lens: expected \(B,\) with B=2"),
    "indices": (
        {"block_indices": torch.zeros(2, 3, 1).int()},
        r"block_indices: expected \(B, K\)",
    ),
    "beyond": ({"block_indices": torch.tensor([[3], [0]]).int()}, r"block_indices: .*got 3"),
    "order": (
        {"block_indices": torch.tensor([[1, 0], [0, -1]]).int()},
        r"ascending.*got 0 after 1",
    ),
    "twice": (
        {"block_indices": torch.tensor([[1, 1], [0, -1]]).int()},
        r"ascending.*got 1 after 1",
    ),
    "window": ({"window": 0}, r"window: expected at least 1, got 0"),
    "sinks": ({"sinks": -1}, r"sinks: expected at least 0, got -1"),
    "bias": (
        {"key_bias": torch.zeros(3, 16)},
        r"key_bias: expected .*\(9, 2, 16\).*got \(3, 16\)",
    ),
    "bias integers": ({"key_bias": torch.zeros(16).long()}, r"key_bias: expected float32.*int64"),
    "bias dtype": ({"key_bias": torch.zeros(16).double()}, r"key_bias: .*got float64"),
}


@pytest.mark.parametrize("case", BAD)
def test_errors_name_the_argument(case):
    names = ("query", "key_pages", "value_pages", "block_table", "seq_lens")
    arguments = dict(zip(names, make([40, 33]), strict=True))
    assert arguments["key_pages"].shape[0] == 9
    changes, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        paged_attention(**{**arguments, **changes})
