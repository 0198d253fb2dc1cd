"""What a row may not see never changes it, by a single bit, not even as NaN: forward and backward.

A kernel that leaks a future row trains to a wonderful loss and generates nonsense, so every
convention is probed at every row.
"""

from __future__ import annotations

import pytest
import torch

from torch_winnow.attention import block_diagonal_attention, cat_attention, chunk_attention

NAN = float("nan")


def cat_mask(rows, block):
    j, i = torch.arange(rows)[:, None], torch.arange(rows)[None, :]
    return (i <= j) & ((i // block == j // block) | (i % block == 0))


@pytest.mark.parametrize("poison", [NAN, float("inf"), 1e4])
@pytest.mark.parametrize("block", [1, 4, 17, 33])
def test_cat_rows_see_no_excluded_row(block, poison, dtype, cpu_capability):
    rows = 70
    query, key, value = torch.randn(3, 1, 1, rows, 24).to(dtype).unbind(0)
    clean = cat_attention(query, key, value, block_size=block)
    mask = cat_mask(rows, block)
    for i in range(0, rows, 3):
        bad_key, bad_value = key.clone(), value.clone()
        bad_key[:, :, i] = poison
        bad_value[:, :, i] = poison
        result = cat_attention(query, bad_key, bad_value, block_size=block)
        blind = ~mask[:, i]
        assert torch.equal(result[:, :, blind], clean[:, :, blind])
        if poison != poison:
            assert result[:, :, mask[:, i]].isnan().all()


# (slots of chunk i before it is complete): slot 0 dummy and slot n+1 compresses chunk n; slot n
# compresses chunk n; two slots per chunk.
@pytest.mark.parametrize(("initial", "per_chunk", "lookback"), [(1, 1, 0), (0, 1, 1), (2, 2, 2)])
def test_no_token_sees_the_future_through_slots(
    initial, per_chunk, lookback, dtype, cpu_capability
):
    rows, chunk, dim = 60, 7, 16
    chunks = -(-rows // chunk)
    slots = initial + (chunks - 1) * per_chunk
    query, key, value = torch.randn(3, 1, 2, rows, dim).to(dtype).unbind(0)
    slot_key, slot_value = torch.randn(2, 1, 2, slots, dim).to(dtype).unbind(0)

    def attend(*tensors):
        return chunk_attention(
            *tensors,
            chunk_size=chunk,
            initial_slots=initial,
            slots_per_chunk=per_chunk,
            lookback=lookback,
        )

    clean = attend(query, key, value, slot_key, slot_value)
    for t in range(0, rows, 2):
        # Everything that is computed from tokens after t: the tokens, and their chunk's slots.
        future = [x.clone() for x in (query, key, value, slot_key, slot_value)]
        for x in future[:3]:
            x[:, :, t + 1 :] = NAN
        first_unknown = initial + (t // chunk) * per_chunk
        for x in future[3:]:
            x[:, :, first_unknown:] = NAN
        assert torch.equal(attend(*future)[:, :, : t + 1], clean[:, :, : t + 1])
        # Tokens before the window are not seen either.
        begin = max(0, (t // chunk - lookback) * chunk)
        past = [x.clone() for x in (key, value)]
        for x in past:
            x[:, :, :begin] = NAN
        result = attend(query, *past, slot_key, slot_value)
        assert torch.equal(result[:, :, t], clean[:, :, t])


def test_sequences_do_not_see_each_other(cpu_capability):
    seqlens = torch.tensor([0, 20, 20, 51, 60])
    inputs = list(torch.randn(3, 1, 2, 60, 16).unbind(0)) + list(
        torch.randn(2, 1, 2, 9, 16).unbind(0)
    )
    owned = [(0, 3), (3, 4), (4, 8), (8, 9)]  # chunks of 8: ceil(20/8), none, ceil(31/8), ceil(9/8)
    owned[3] = (8, 10)
    inputs[3], inputs[4] = torch.randn(2, 1, 2, 10, 16).unbind(0)
    clean = chunk_attention(*inputs, chunk_size=8, cu_seqlens=seqlens)
    for sequence in (0, 2, 3):
        begin, end = seqlens[sequence].item(), seqlens[sequence + 1].item()
        poisoned = [x.clone() for x in inputs]
        for x in poisoned[:3]:
            x[:, :, begin:end] = NAN
        for x in poisoned[3:]:
            x[:, :, slice(*owned[sequence])] = NAN
        result = chunk_attention(*poisoned, chunk_size=8, cu_seqlens=seqlens)
        assert torch.equal(result[:, :, :begin], clean[:, :, :begin])
        assert torch.equal(result[:, :, end:], clean[:, :, end:])
        assert result[:, :, begin:end].isnan().all()


@pytest.mark.parametrize("causal", [False, True])
def test_blocks_do_not_see_each_other(causal, dtype, cpu_capability):
    tensors = torch.randn(3, 1, 1, 80, 16).to(dtype)
    clean = block_diagonal_attention(*tensors, block_size=17, causal=causal)
    for block in range(5):
        rows = slice(17 * block, 17 * (block + 1))
        poisoned = tensors.clone()
        poisoned[:, :, :, rows] = NAN
        result = block_diagonal_attention(*poisoned, block_size=17, causal=causal)
        keep = torch.ones(80, dtype=torch.bool)
        keep[rows] = False
        assert torch.equal(result[:, :, keep], clean[:, :, keep])


@pytest.mark.parametrize("block", [4, 17])
def test_gradients_do_not_leak(block, dtype, cpu_capability):
    """A NaN in row i (of query, key, value or the incoming gradient) stays with what touches it."""
    rows = 70
    tensors = torch.randn(3, 1, 1, rows, 24).to(dtype)
    upstream = torch.randn(1, 1, rows, 24).to(dtype)
    mask = cat_mask(rows, block)

    def gradients(tensors, upstream):
        leaves = [x.clone().requires_grad_() for x in tensors]
        out = cat_attention(*leaves, block_size=block)
        return torch.autograd.grad(out, leaves, upstream)

    clean = gradients(tensors, upstream)
    for i in range(0, rows, 7):
        for which in range(4):
            bad, bad_upstream = tensors.clone(), upstream.clone()
            if which < 3:
                bad[which, :, :, i] = NAN
            else:
                bad_upstream[:, :, i] = NAN
            result = gradients(bad, bad_upstream)
            # Rows of queries that the NaN reaches in the forward, and the keys that those see.
            reached = mask[:, i] if which in (1, 2) else torch.arange(rows) == i
            keys = mask[reached].any(0)
            assert torch.equal(result[0][:, :, ~reached], clean[0][:, :, ~reached])
            for grad, expected in zip(result[1:], clean[1:], strict=True):
                assert torch.equal(grad[:, :, ~keys], expected[:, :, ~keys])


def test_gradients_of_unseen_slots_are_zero(dtype, cpu_capability):
    query, key, value = torch.randn(3, 1, 2, 30, 8).to(dtype).unbind(0)
    slots = torch.randn(2, 1, 2, 9, 8).to(dtype)
    slots[:, :, :, 4:] = NAN  # four chunks of 8 see slots 0..3
    slots.requires_grad_()
    out = chunk_attention(query, key, value, *slots.unbind(0), chunk_size=8)
    assert out.isfinite().all()
    out.float().square().sum().backward()
    assert torch.equal(slots.grad[:, :, :, 4:], torch.zeros_like(slots.grad[:, :, :, 4:]))
    assert slots.grad[:, :, :, :4].isfinite().all()
