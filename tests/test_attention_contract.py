"""The whole contract at once: every convention, dimension, grouping and layout.

What a row sees is read off the result itself: with one-hot values the output is the matrix of
attention weights, and with one-hot upstream gradients the gradient of the values is its transpose.
"""

from __future__ import annotations

import itertools

import pytest
import torch

from torch_winnow import attention, reference
from torch_winnow.attention import block_diagonal_attention, cat_attention, chunk_attention

HEADS, KV_HEADS = 4, 2
CONVENTIONS = list(itertools.product((0, 1, 2), (1, 2, 3), (0, 1, 4)))  # initial, per chunk, back


def visible(length, slots, chunk, initial, per_chunk, lookback):
    """``(length, slots + length)``: what each token may see, by the words of the contract."""
    mask = torch.zeros(length, slots + length, dtype=torch.bool)
    for t in range(length):
        i = t // chunk
        mask[t, : min(slots, initial + i * per_chunk)] = True
        mask[t, slots + max(0, (i - lookback) * chunk) : slots + t + 1] = True
    return mask


def weights_and_transposes(function, rows, slots, dtype):
    """The attention weights ``(Hq, rows, slots + rows)`` forward, and their transpose backward.

    ``function(query, key, value, slot_key, slot_value)``; slots + rows one-hot values fit in D.
    """
    keys = slots + rows
    query = torch.randn(1, HEADS, rows, keys)
    key = torch.randn(1, KV_HEADS, keys, keys) / keys**0.5
    value = torch.eye(keys).expand(1, KV_HEADS, keys, keys)
    query, key = query.to(dtype).requires_grad_(), key.to(dtype).requires_grad_()
    value = value.to(dtype).requires_grad_()
    out = function(
        query, key[:, :, slots:], value[:, :, slots:], key[:, :, :slots], value[:, :, :slots]
    )
    upstream = torch.eye(rows, keys, dtype=dtype).expand(1, HEADS, rows, keys)
    grad_query, grad_key, grad_value = torch.autograd.grad(out, (query, key, value), upstream)
    assert grad_query.isfinite().all()
    assert grad_key.isfinite().all()
    return out[0].detach(), grad_value[0, :, :, :rows]


def check_visible(function, mask, slots, dtype):
    rows = len(mask)
    weights, transposes = weights_and_transposes(function, rows, slots, dtype)
    assert torch.equal(weights > 0, mask.expand(HEADS, -1, -1))
    total = weights.double().sum(-1)
    torch.testing.assert_close(total, mask.any(1).double().expand(HEADS, -1), rtol=0, atol=2e-2)
    assert torch.equal(transposes > 0, mask.mT.expand(KV_HEADS, -1, -1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("chunk", [1, 5, 9, 40])
def test_chunk_rows_see_what_each_convention_says(chunk, dtype, cpu_capability):
    rows, slots = 44, 20
    for initial, per_chunk, lookback in CONVENTIONS:
        check_visible(
            lambda *x, i=initial, p=per_chunk, b=lookback: chunk_attention(
                *x, chunk_size=chunk, initial_slots=i, slots_per_chunk=p, lookback=b
            ),
            visible(rows, slots, chunk, initial, per_chunk, lookback),
            slots,
            dtype,
        )


@pytest.mark.parametrize("lengths", [[0, 1, 17, 0, 6, 4], [24, 1, 1, 1, 1], [0, 0, 28]], ids=str)
def test_packed_rows_see_what_each_convention_says(lengths, cpu_capability):
    chunk, rows = 5, sum(lengths)
    seqlens = torch.tensor([0, *lengths]).cumsum(0)
    for initial, per_chunk, lookback in CONVENTIONS:
        owned = [initial + max(-(-n // chunk) - 1, 0) * per_chunk for n in lengths]
        slots = sum(owned)
        mask = torch.zeros(rows, slots + rows, dtype=torch.bool)
        begin = slot = 0
        for length, own in zip(lengths, owned, strict=True):
            part = visible(length, own, chunk, initial, per_chunk, lookback)
            mask[begin : begin + length, slot : slot + own] = part[:, :own]
            columns = slice(slots + begin, slots + begin + length)
            mask[begin : begin + length, columns] = part[:, own:]
            begin, slot = begin + length, slot + own
        check_visible(
            lambda *x, i=initial, p=per_chunk, b=lookback: chunk_attention(
                *x,
                chunk_size=chunk,
                initial_slots=i,
                slots_per_chunk=p,
                lookback=b,
                cu_seqlens=seqlens,
            ),
            mask,
            slots,
            torch.float32,
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("block", [1, 2, 5, 9, 17, 33, 65])
def test_blocks_of_any_length(block, dtype, cpu_capability):
    rows = 70
    j, i = torch.arange(rows)[:, None], torch.arange(rows)[None, :]
    same = i // block == j // block
    masks = {
        "cat": (i <= j) & (same | (i % block == 0)),
        "block": same,
        "causal block": same & (i <= j),
    }
    functions = {
        "cat": lambda q, k, v, *_: cat_attention(q, k, v, block_size=block),
        "block": lambda q, k, v, *_: block_diagonal_attention(q, k, v, block_size=block),
        "causal block": lambda q, k, v, *_: block_diagonal_attention(
            q, k, v, block_size=block, causal=True
        ),
    }
    for name, function in functions.items():
        check_visible(function, masks[name], 0, dtype)


TOLERANCE = {  # of values, and of gradients, which pass through two roundings more
    torch.float32: ({"rtol": 2e-5, "atol": 2e-6}, {"rtol": 1e-4, "atol": 2e-5}),
    torch.bfloat16: ({"rtol": 1.6e-2, "atol": 1e-2}, {"rtol": 4e-2, "atol": 4e-2}),
}


def check_against_definition(function, definition, inputs):
    """Result, lse and gradients against the definition in float64 on the same rounded inputs."""
    dtype = inputs[0].dtype
    values, gradients = TOLERANCE[dtype]
    narrow = [x.detach().requires_grad_() for x in inputs]
    wide = [x.detach().double().requires_grad_() for x in inputs]
    out, lse = function(narrow)
    expected, expected_lse = definition(wide)
    torch.testing.assert_close(out.double(), expected, **values)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=2e-5, atol=2e-5)
    upstream = torch.randn_like(out), torch.randn_like(lse)
    ours = torch.autograd.grad((out, lse), narrow, upstream)
    theirs = torch.autograd.grad((expected, expected_lse), wide, [x.double() for x in upstream])
    for grad, value in zip(ours, theirs, strict=True):
        torch.testing.assert_close(grad.double(), value, **gradients)


def families(chunk):
    """Each function with its definition, of query, key, value, slot_key and slot_value."""
    options = {"chunk_size": chunk, "slots_per_chunk": 2, "initial_slots": 2, "lookback": 1}
    for module in (attention, reference):
        yield (
            lambda x, m=module: m.chunk_attention(*x, **options, return_lse=True),
            lambda x, m=module: m.cat_attention(*x[:3], block_size=chunk, return_lse=True),
            lambda x, m=module: m.block_diagonal_attention(
                *x[:3], block_size=chunk, return_lse=True
            ),
        )


def check_families(chunk, query, key, value, slot_key, slot_value):
    ours, theirs = families(chunk)
    inputs = [query, key, value, slot_key, slot_value]
    for function, definition, count in zip(ours, theirs, (5, 3, 3), strict=True):
        check_against_definition(function, definition, inputs[:count])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dim", [16, 32, 48, 80, 96, 112, 128, 160, 192, 256])
def test_every_head_dimension(dim, dtype, cpu_capability):
    query = torch.randn(1, 2, 40, dim).to(dtype)
    key, value = torch.randn(2, 1, 1, 40, dim).to(dtype)
    slots = torch.randn(2, 1, 1, 11, dim).to(dtype)
    check_families(9, query, key, value, *slots)


@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 1), (7, 1), (6, 3), (12, 2), (5, 5), (32, 4)])
def test_every_grouping(heads, kv_heads, cpu_capability):
    query = torch.randn(2, heads, 30, 24)
    key, value = torch.randn(2, 2, kv_heads, 30, 24)
    slots = torch.randn(2, 2, kv_heads, 9, 24)
    check_families(7, query, key, value, *slots)


def strided(rows, dim):
    """Query, key, value as one projection makes them, slots out of an interleaved layout."""
    packed = torch.randn(2, rows, 3, 4, dim + 8)[..., :dim].transpose(1, 3)  # (B, H, 3, N, D)
    blocks = torch.randn(2, 2, 4, 9, 5, dim)  # (2, B, H, blocks, rows, D)
    return [*packed.unbind(2), *blocks[..., 0, :].unbind(0)]


def allocated(function):
    """Bytes of every allocation that a call makes through torch."""
    with torch.autograd.profiler.profile(profile_memory=True, use_kineto=True) as profile:
        result = function()
    events = profile.kineto_results.events()
    sizes = [event.nbytes() for event in events if event.name() == "[memory]"]
    assert sizes
    return result, sum(size for size in sizes if size > 0)


def test_strided_inputs_are_not_copied():
    inputs = strided(200, 40)
    dense = [x.contiguous() for x in inputs]
    assert not any(x.is_contiguous() for x in inputs)
    for function, count in zip(next(families(9)), (5, 3, 3), strict=True):
        leaves = [x.requires_grad_() for x in inputs[:count]]
        dense_leaves = [x.requires_grad_() for x in dense[:count]]
        (out, lse), strided_bytes = allocated(lambda f=function, x=leaves: f(x))
        (expected, expected_lse), bytes_ = allocated(lambda f=function, x=dense_leaves: f(x))
        assert strided_bytes == bytes_
        assert torch.equal(out, expected)
        assert torch.equal(lse, expected_lse)
        upstream = torch.randn(2, 200, 4, 40).transpose(1, 2)
        grads, strided_bytes = allocated(
            lambda o=out, x=leaves, u=upstream: torch.autograd.grad(o, x, u)
        )
        expected_grads, bytes_ = allocated(
            lambda o=expected, x=dense_leaves, u=upstream: torch.autograd.grad(o, x, u)
        )
        assert strided_bytes == bytes_
        assert all(torch.equal(a, b) for a, b in zip(grads, expected_grads, strict=True))


GRADCHECKS = {
    "two slots per chunk": {"slots_per_chunk": 2, "initial_slots": 2},
    "no initial slot": {"initial_slots": 0, "slots_per_chunk": 3, "lookback": 2},
    "packed": {"cu_seqlens": torch.tensor([0, 6, 6, 7, 13]), "lookback": 1},
    "packed, no initial slot": {
        "cu_seqlens": torch.tensor([0, 0, 13]),
        "initial_slots": 0,
        "slots_per_chunk": 2,
        "scale": -0.7,
    },
}


@pytest.mark.parametrize("options", GRADCHECKS.values(), ids=GRADCHECKS)
def test_gradcheck_of_every_convention(options):
    # Strided leaves: gradcheck perturbs what the kernel reads.
    query = torch.randn(1, 13, 4, 3, dtype=torch.float64).transpose(1, 2).requires_grad_()
    key, value = (
        torch.randn(1, 13, 2, 3, dtype=torch.float64).transpose(1, 2).requires_grad_()
        for _ in range(2)
    )
    slots = [torch.randn(1, 2, 9, 3, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    assert torch.autograd.gradcheck(
        lambda *x: chunk_attention(*x, chunk_size=4, **options, return_lse=True),
        (query, key, value, *slots),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_have_the_same_bits_for_any_number_of_threads(dtype, on_thread_counts):
    query = torch.randn(2, 6, 700, 24).to(dtype).requires_grad_()
    key, value = (torch.randn(2, 2, 700, 24).to(dtype).requires_grad_() for _ in range(2))
    slots = [torch.randn(2, 2, 150, 24).to(dtype).requires_grad_() for _ in range(2)]
    inputs = [query, key, value, *slots]

    def gradients():
        found = []
        for function, count in zip(next(families(9)), (5, 3, 3), strict=True):
            out, lse = function(inputs)
            loss = (out.float() ** 2).sum() + lse.sin().sum()
            found += [out, lse, *torch.autograd.grad(loss, inputs[:count])]
        return found

    results = on_thread_counts(gradients)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))
