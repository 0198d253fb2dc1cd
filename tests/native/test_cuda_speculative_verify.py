"""speculative_verify on the GPU: its decisions are the definition's, its draws the target's."""

from __future__ import annotations

import pytest
import torch

from test_unmasking_verification import decided
from torch_winnow import reference
from torch_winnow.unmasking import speculative_verify

INF, NAN = float("inf"), float("nan")


def check_greedy(drafts, target, **options):
    result = speculative_verify(drafts, None, target, temperature=0.0, **options)
    expected = reference.speculative_verify(
        drafts, None, target.double(), temperature=0.0, **options
    )
    for name in ("accepted", "token", "tokens"):
        assert torch.equal(getattr(result, name), getattr(expected, name)), name
    torch.testing.assert_close(
        result.log_prob.double(), expected.log_prob, rtol=2e-5, atol=2e-5, equal_nan=True
    )


@pytest.mark.parametrize("vocab", [1, 7, 256, 8193])
def test_greedy(gpu, vocab, dtype):
    target = torch.randn(3, 3, vocab, device=gpu).to(dtype)
    drafts = target[:, :2].argmax(-1)
    drafts[1, 0] = drafts[2, 1] = vocab - 1
    check_greedy(drafts, target)
    lengths = torch.tensor([2, 0, 1], device=gpu)
    check_greedy(drafts, target, lengths=lengths)
    order = torch.tensor([[1, 0], [0, -1], [-1, 0]], device=gpu)
    check_greedy(drafts, target[:, :2].contiguous(), order=order)
    check_greedy(drafts, target[:, :2], order=order, lengths=lengths.clamp(max=1))


@pytest.mark.parametrize("certain", [False, True], ids=["drawn", "certain"])
@pytest.mark.parametrize("wide", [torch.float32, torch.float64])
def test_decisions_are_the_definitions_for_the_same_uniforms(gpu, wide, certain):
    batch, vocab, seed = 40, 6, 5
    q, p = 2 * torch.randn(2, batch, 1, vocab, dtype=wide)
    drafts = q.softmax(-1).view(-1, vocab).multinomial(1)
    result = speculative_verify(
        drafts.to(gpu), None if certain else q.to(gpu), p.to(gpu), seed=seed
    )
    p, q = p.double().softmax(-1), q.double().softmax(-1)
    assert 0 < result.accepted.sum() < batch
    for b in range(batch):
        expected = decided(drafts[b], None if certain else q[b], p[b], seed, b)
        assert result.tokens[b].tolist() == expected


@pytest.mark.parametrize("certain", [False, True], ids=["drawn", "certain"])
def test_tokens_follow_the_target(gpu, certain):
    """Two slices, one row a draw: 4.9 standard errors, one in a million, for each token."""
    rows = 4000 if gpu.type == "cuda" else 30
    tokens = torch.tensor([5, 6, 8191, 8192, 8500], device=gpu)
    p = torch.full((2, 8600), -INF, device=gpu)
    p[0, tokens] = torch.tensor([0.0, 1.0, 2.0, 0.5, 1.5], device=gpu)
    p[1, 0] = 0.0
    q = torch.full((1, 8600), -INF, device=gpu)
    q[0, tokens[:4]] = torch.tensor([2.0, 0.0, 1.0, 0.5], device=gpu)
    drafts = (q[0] / 1.3).softmax(-1).multinomial(rows, replacement=True)[:, None]
    if certain:
        drafts = tokens[2].expand(rows, 1)
    result = speculative_verify(
        drafts,
        None if certain else q.expand(rows, 1, -1),
        p.expand(rows, 2, -1),
        temperature=1.3,
        seed=7,
    )
    share = (p[0, tokens].double() / 1.3).softmax(-1)
    hits = (result.tokens[:, :1] == tokens).sum(0)
    assert hits.sum() == rows
    assert ((hits - rows * share).abs() <= 4.9 * (rows * share * (1 - share)).sqrt()).all()
    assert 0 < result.accepted.sum() < rows
    assert (result.token[result.accepted == 1] == 0).all()
    drawn = share[torch.searchsorted(tokens, result.tokens[:, 0].contiguous())]
    torch.testing.assert_close(result.log_prob[:, 0].exp().double(), drawn, rtol=1e-5, atol=1e-6)


def test_equal_distributions_are_always_accepted(gpu):
    logits = torch.randn(8, 3, 300, device=gpu)
    drafts = torch.randint(0, 300, (8, 2), device=gpu)
    result = speculative_verify(drafts, logits[:, :2].contiguous(), logits, seed=1)
    assert (result.accepted == 2).all()
    assert (result.token >= 0).all()


@pytest.mark.parametrize("bad", [NAN, INF])
def test_rows_without_a_distribution_end_the_step(gpu, bad):
    target = torch.zeros(4, 3, 10, device=gpu)
    target[:, :, 1] = 50.0
    q = target[:, :2].clone()
    drafts = torch.ones(4, 2, dtype=torch.int64, device=gpu)
    target[0, 0, 7] = bad
    target[1, 1] = -INF
    q[2, 1, 3] = bad
    target[3, 2, 0] = bad
    result = speculative_verify(drafts, q, target, seed=1)
    assert result.accepted.tolist() == [0, 1, 1, 2]
    assert result.token.tolist() == [-1] * 4
    assert result.log_prob.isnan().nonzero().tolist() == [[0, 0], [1, 1], [2, 1], [3, 2]]
    check_greedy(drafts, target)


@pytest.mark.parametrize("temperature", [1e-300, 1e300])
def test_extreme_temperatures(gpu, temperature):
    target = torch.tensor([[[-INF, 1.0, 0.0, -INF]] * 2], device=gpu)
    drafts = torch.tensor([[1]], device=gpu)
    for seed in range(8):
        result = speculative_verify(drafts, None, target, temperature=temperature, seed=seed)
        assert set(result.tokens[0].tolist()) <= ({1, -1} if temperature < 1 else {1, 2, -1})
        assert not result.log_prob.isnan().any()


def test_indices_out_of_range_are_never_followed(gpu):
    target = torch.randn(2, 2, 9, device=gpu)
    drafts = torch.tensor([[10**9, 0], [-5, 0]], device=gpu)
    lengths = torch.tensor([10**9, -1], device=gpu)
    order = torch.tensor([[0, 10**9], [1, -7]], device=gpu)
    for options in ({"temperature": 0.0}, {"seed": 3}):
        for more in ({"lengths": lengths}, {"order": order}):
            result = speculative_verify(drafts, target, target, **more, **options)
            assert result.accepted[0] == 0
            assert ((result.token >= -1) & (result.token < 9)).all()


def test_results_depend_on_neither_order_nor_batch(gpu, on_every_order):
    target = torch.randn(3, 3, 9000, device=gpu)
    q = target[:, :2] + 0.7 * torch.randn(3, 2, 9000, device=gpu)
    drafts = q.softmax(-1).view(-1, 9000).multinomial(1).view(3, 2)
    seed = torch.tensor(3, device=gpu)
    results = on_every_order(lambda: speculative_verify(drafts, q, target, seed=seed))
    for result in results[1:]:
        for ours, first in zip(result, results[0], strict=True):
            assert torch.equal(ours, first)
    few = speculative_verify(drafts[:1], q[:1], target[:1], seed=3)
    assert torch.equal(few.tokens, results[0].tokens[:1])


def test_strided_and_empty(gpu):
    target = torch.randn(2, 3, 801, device=gpu)[..., 1:]
    check_greedy(target[:, :2].argmax(-1), target)
    none = torch.empty(2, 0, dtype=torch.int64, device=gpu)
    assert speculative_verify(none, None, target[:, :1], seed=0).token.shape == (2,)
    result = speculative_verify(none[:0], None, target[:0, :1], seed=0)
    assert result.tokens.shape == (0, 1)


def test_errors_name_the_argument(gpu):
    with pytest.raises(ValueError, match="temperature: expected a finite number"):
        speculative_verify(
            torch.zeros(1, 0, dtype=torch.int64, device=gpu),
            None,
            torch.zeros(1, 1, 5, device=gpu),
            temperature=-1.0,
        )
