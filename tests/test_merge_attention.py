"""merge_attention against its definition, and partial results against the whole."""

from __future__ import annotations

import pytest
import torch

from conftest import TOLERANCE
from torch_winnow import reference
from torch_winnow.attention import block_diagonal_attention, chunk_attention, merge_attention

INF = float("inf")
NAN = float("nan")


@pytest.mark.parametrize("parts", [1, 2, 5])
@pytest.mark.parametrize("shape", [(1, 1), (2, 3, 7, 16), (5, 65), (3, 0, 4), (2, 3, 0)], ids=str)
@pytest.mark.parametrize("stacked", [False, True])
def test_matches_definition(parts, shape, stacked, dtype, device):
    outs = torch.randn(parts, *shape).to(device, dtype)
    lses = 5 * torch.randn(parts, *shape[:-1]).to(device)
    lses[torch.rand_like(lses) < 0.3] = -INF
    out, lse = merge_attention(outs, lses) if stacked else merge_attention(list(outs), list(lses))
    assert out.dtype == dtype
    assert lse.dtype == torch.float32
    expected, expected_lse = reference.merge_attention(outs.double(), lses.double())
    torch.testing.assert_close(out.double(), expected, **TOLERANCE[dtype])
    torch.testing.assert_close(lse.double(), expected_lse, **TOLERANCE[torch.float32])


def test_parts_make_the_whole():
    query, key, value = torch.randn(3, 1, 2, 40, 16).unbind(0)
    slots = torch.randn(2, 1, 2, 6, 16)
    whole = chunk_attention(query, key, value, *slots, chunk_size=8, return_lse=True)
    local = block_diagonal_attention(query, key, value, block_size=8, causal=True, return_lse=True)
    nothing = torch.full_like(key, -INF)
    scores = query @ slots[0].mT / 4
    visible = torch.arange(6) < 1 + torch.arange(40)[:, None] // 8
    scores = scores.masked_fill(~visible, -INF)
    remote = scores.softmax(-1) @ slots[1], scores.logsumexp(-1)
    merged = merge_attention(*zip(local, remote, strict=True))
    torch.testing.assert_close(merged, whole)
    assert nothing.isinf().all()


def test_a_part_that_saw_nothing_is_not_read(dtype):
    out = torch.randn(2, 4, 8).to(dtype)
    lse = torch.randn(2, 4)
    lse[1, 2] = lse[0, 3] = lse[1, 3] = -INF
    out[1, 2] = NAN
    out[:, 3] = NAN
    out.requires_grad_()
    lse.requires_grad_()
    merged, merged_lse = merge_attention(out, lse)
    torch.testing.assert_close(merged[2], out[0, 2])
    assert torch.equal(merged[3], torch.zeros(8, dtype=dtype))
    assert merged_lse[3] == -INF
    merged.sum().backward()
    assert out.grad.isfinite().all()
    assert lse.grad.isfinite().all()
    assert not out.grad[1, 2].any()


def test_strided_and_expanded_parts():
    outs = torch.randn(2, 3, 8, 20)[..., 4:12].transpose(1, 2)  # (2, 8, 3, 8)
    lses = torch.randn(2, 3, 8).transpose(1, 2)
    assert torch.equal(
        merge_attention(outs, lses)[0], merge_attention(outs.contiguous(), lses.contiguous())[0]
    )
    row = torch.randn(2, 1, 8).expand(2, 3, 8)
    lse = torch.zeros(2, 1).expand(2, 3)
    torch.testing.assert_close(merge_attention([row, row], [lse, lse])[0], row)


def test_gradients():
    outs = [torch.randn(2, 3, 70, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    lses = [torch.randn(2, 3, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    assert torch.autograd.gradcheck(
        lambda *x: merge_attention(x[:3], x[3:]), (*outs, *lses), fast_mode=True
    )
    out = merge_attention(outs, lses)[0]
    (grad,) = torch.autograd.grad(out.square().sum(), outs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="merge_attention is differentiable once"):
        grad.sum().backward()


@pytest.mark.parametrize(
    ("outs", "lses", "message"),
    [
        ([], [], "outs: expected at least one partial result"),
        ([torch.zeros(2, 3)], [], "lses: expected 1 tensors"),
        ([torch.zeros(3)], [torch.zeros(())], r"outs\[0\]: expected \(\.\.\., N, D\)"),
        (
            [torch.zeros(2, 3)] * 2,
            [torch.zeros(2), torch.zeros(3)],
            r"lses\[1\]: expected the shape",
        ),
        ([torch.zeros(2, 3), torch.zeros(2, 4)], [torch.zeros(2)] * 2, r"outs\[1\]: .*\(2, 3\)"),
        (
            [torch.zeros(2, 3)],
            [torch.zeros(2).double()],
            r"lses\[0\]: expected float32, got float64",
        ),
        ([torch.zeros(2, 3).int()], [torch.zeros(2)], r"outs\[0\]: expected float32"),
    ],
)
def test_errors_name_the_argument(outs, lses, message):
    with pytest.raises(ValueError, match=message):
        merge_attention(outs, lses)
