"""Merging of partial attention on the GPU, against its definition."""

from __future__ import annotations

import pytest
import torch

from conftest import TOLERANCE
from torch_winnow import reference
from torch_winnow.attention import merge_attention

INF = float("inf")


def parts(gpu, count, shape, dtype):
    outs = torch.randn(count, *shape, device=gpu).to(dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return outs, torch.randn(count, *shape[:-1], device=gpu, dtype=wide) * 3


@pytest.mark.parametrize("dtype", [*TOLERANCE], ids=str)
@pytest.mark.parametrize(("count", "shape"), [(1, (3, 5)), (2, (2, 1, 9, 40)), (64, (5, 33))])
def test_matches_definition(gpu, count, shape, dtype):
    outs, lses = parts(gpu, count, shape, dtype)
    lses[0, ..., 1] = -INF
    outs[0, ..., 1, :] = torch.nan  # of no weight, and not read
    lses[..., 2] = -INF
    inputs = [outs.requires_grad_(), lses.requires_grad_()]
    results = merge_attention(*inputs)
    weights = [torch.randn_like(x) for x in results]
    grads = torch.autograd.grad(results, inputs, weights)
    clean = outs.detach().double().nan_to_num()
    wide = [clean.requires_grad_(), lses.detach().double().requires_grad_()]
    expected = reference.merge_attention(*wide)
    for result, value in zip(results, expected, strict=True):
        torch.testing.assert_close(result.double(), value, **TOLERANCE[result.dtype])
    seen = expected[1] > -INF
    loss = (expected[0] * weights[0]).sum() + (expected[1][seen] * weights[1][seen]).sum()
    for grad, value in zip(grads, torch.autograd.grad(loss, wide), strict=True):
        tolerance = {"rtol": 4 * TOLERANCE[dtype]["rtol"], "atol": 4 * TOLERANCE[dtype]["atol"]}
        torch.testing.assert_close(grad.double(), value.nan_to_num(), **tolerance)


def test_strided_parts(gpu):
    outs = torch.randn(2, 6, 2, 24, device=gpu).transpose(1, 2)[..., :16]
    lses = torch.randn(2, 6, 2, device=gpu).transpose(1, 2)
    expected = merge_attention(outs.clone(), lses.clone())
    for result, value in zip(merge_attention(outs, lses), expected, strict=True):
        assert torch.equal(result, value)


def test_nothing_and_too_many(gpu):
    out, lse = merge_attention(*parts(gpu, 2, (0, 5), torch.float32))
    assert out.shape == (0, 5)
    assert lse.shape == (0,)
    with pytest.raises(ValueError, match="outs: expected at most 64 partial results"):
        merge_attention(*parts(gpu, 65, (1, 2), torch.float32))


def test_same_bits_in_every_order(on_every_order, gpu):
    outs, lses = parts(gpu, 3, (2, 9, 16), torch.bfloat16)
    results = on_every_order(lambda: merge_attention(outs, lses))
    for out, lse in results[1:]:
        assert torch.equal(out, results[0][0])
        assert torch.equal(lse, results[0][1])
