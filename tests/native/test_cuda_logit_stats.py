"""logit_stats on the GPU, against its definition and at its edges."""

from __future__ import annotations

import pytest
import torch

from torch_winnow import reference
from torch_winnow.unmasking import logit_stats

INF, NAN = float("inf"), float("nan")
NAMES = ("log_prob", "max_prob", "margin", "entropy", "logsumexp", "target_log_prob", "kl")


def check(logits, tolerance=2e-5, **options):
    """Everything but a drawn token."""
    result = logit_stats(logits, **options)
    wide = {
        name: option.double() if name in ("previous_logits", "unconditional_logits") else option
        for name, option in options.items()
    }
    expected = reference.logit_stats(logits.double(), **wide)
    assert torch.equal(result.argmax, expected.argmax)
    assert torch.equal(result.token, expected.token)
    for name in NAMES:
        ours, theirs = getattr(result, name), getattr(expected, name)
        assert (ours is None) == (theirs is None), name
        if ours is not None:
            torch.testing.assert_close(
                ours.double(), theirs, rtol=tolerance, atol=tolerance, equal_nan=True, msg=name
            )
    return result


@pytest.mark.parametrize("temperature", [1.0, 0.3, 0.0])
@pytest.mark.parametrize("shape", [(1,), (3, 7), (2, 2, 256), (1, 8192), (2, 8193), (1, 20011)])
def test_matches_definition(gpu, shape, temperature, dtype):
    check((4 * torch.randn(shape)).to(gpu, dtype), temperature=temperature)


def test_double(gpu):
    logits = torch.randn(2, 9001, device=gpu, dtype=torch.float64)
    check(logits, 1e-11, previous_logits=logits + torch.randn_like(logits), top_k=50, top_p=0.9)


def test_every_option_at_once(gpu, dtype):
    logits, base, previous = (2 * torch.randn(3, 4, 9000)).to(gpu, dtype)
    check(
        logits,
        mask=torch.rand(4, device=gpu) < 0.6,
        temperature=0.8,
        suppress_ids=torch.tensor([3, 8999, 8191, 8192, 3], device=gpu),
        target_ids=torch.tensor([0, 3, 8999, 17], device=gpu),
        previous_logits=previous,
        unconditional_logits=base,
        cfg_scale=1.5,
        tolerance=1e-4,
    )


@pytest.mark.parametrize("statistics", ["processed", "raw"])
@pytest.mark.parametrize(
    "options",
    [{"top_k": 1}, {"top_k": 40}, {"top_p": 0.5}, {"top_p": 1e-9}, {"top_k": 30, "top_p": 0.8},
     {"min_p": 0.05}, {"min_p": 1.0}, {"min_p": 0.01, "top_k": 9, "top_p": 0.9}],
    ids=str,
)  # fmt: skip
def test_truncation(gpu, options, statistics):
    logits = 3 * torch.randn(3, 9000, device=gpu)
    logits[:, ::3] = -INF
    previous = logits + torch.randn_like(logits)
    target_ids = logits.argmax(-1)
    check(
        logits,
        temperature=0.9,
        statistics=statistics,
        previous_logits=previous,
        target_ids=target_ids,
        **options,
    )


@pytest.mark.parametrize(
    "options",
    [{"top_k": 1}, {"top_k": 5}, {"top_p": 0.3}, {"top_k": 4, "top_p": 0.9}, {"min_p": 1.0}],
    ids=str,
)
def test_ties_are_kept_from_the_lowest_id(gpu, options):
    logits = torch.zeros(2, 8200, device=gpu)
    logits[1] = -5.0
    logits[1, [7, 100, 8191, 8195]] = 2.0
    check(logits, target_ids=torch.tensor([0, 8195], device=gpu), **options)


@pytest.mark.parametrize(
    "row",
    [
        [0.0, NAN, 1.0],
        [-INF, -INF, -INF],
        [-INF, 2.0, -INF],
        [INF, 0.0, INF],
        [INF, NAN, 0.0],
        [1e30, 1e30, -1e30],
        [3e38, -3e38, 0.0],
        [0.0, 0.0, 0.0],
    ],
    ids=str,
)
@pytest.mark.parametrize("padding", [0, 9000])
@pytest.mark.parametrize("options", [{}, {"top_k": 2}, {"top_p": 0.7}, {"min_p": 0.3}], ids=str)
def test_edges(gpu, row, padding, options):
    logits = torch.tensor([row + [-INF] * padding], device=gpu)
    check(logits, **options)


def test_previous_without_mass(gpu):
    logits = torch.tensor([[0.0, 1.0, -INF], [0.0, 1.0, 2.0], [0.0, 0.0, NAN]], device=gpu)
    previous = torch.tensor([[0.0, 1.0, 2.0], [0.0, -INF, 2.0], [0.0, 0.0, 0.0]], device=gpu)
    assert check(logits, previous_logits=previous).kl[1] == INF
    check(logits[:2], previous_logits=torch.full((2, 3), -INF, device=gpu))


def test_skipped_rows_are_not_read(gpu):
    logits = torch.full((3, 50), NAN, device=gpu)
    logits[1] = torch.randn(50)
    mask = torch.tensor([False, True, False], device=gpu)
    result = logit_stats(logits, mask=mask, top_k=3, previous_logits=logits, seed=1)
    assert result.token.tolist()[::2] == [-1, -1]
    assert result.argmax.tolist()[::2] == [0, 0]
    for name in ("log_prob", "max_prob", "margin", "entropy", "logsumexp", "kl"):
        assert getattr(result, name).tolist()[::2] == [0.0, 0.0]
        assert getattr(result, name)[1].isfinite()


def test_strided_and_unaligned_rows(gpu):
    logits = torch.randn(4, 2, 9003, device=gpu).transpose(0, 1)[..., 1:9001]
    check(logits, target_ids=torch.zeros(2, 4, dtype=torch.int64, device=gpu))


def test_empty(gpu):
    assert logit_stats(torch.randn(0, 7, device=gpu)).token.shape == (0,)


@pytest.mark.parametrize("options", [{}, {"top_k": 3}], ids=str)
def test_draws_follow_the_distribution(gpu, options):
    # One row per draw; the tokens lie in two slices. 4.9 standard errors: one in a million.
    rows = 2000 if gpu.type == "cuda" else 250
    tokens = torch.tensor([5, 6, 8191, 8192, 8500], device=gpu)
    logits = torch.full((8600,), -INF, device=gpu)
    logits[tokens] = torch.tensor([0.0, 1.0, 2.0, 0.5, 1.5], device=gpu)
    result = logit_stats(logits.expand(rows, -1), seed=7, temperature=1.3, **options)
    share = reference.logit_stats(
        logits.double().expand(5, -1), temperature=1.3, target_ids=tokens, **options
    ).target_log_prob.exp()
    hits = (result.token[:, None] == tokens).sum(0)
    assert ((hits - rows * share).abs() <= 4.9 * (rows * share * (1 - share)).sqrt() + 1e-9).all()
    drawn = share[torch.searchsorted(tokens, result.token)]
    torch.testing.assert_close(result.log_prob.exp().double(), drawn, rtol=1e-5, atol=1e-6)


def test_draws_depend_on_seed_and_row_alone(gpu, on_every_order):
    logits = torch.randn(6, 9000, device=gpu)
    seed = torch.tensor(3, device=gpu)
    results = on_every_order(lambda: logit_stats(logits, seed=seed, top_p=0.9))
    for result in results[1:]:
        for ours, first in zip(result, results[0], strict=True):
            assert ours is first is None or torch.equal(ours, first)
    assert torch.equal(logit_stats(logits[:2], seed=3, top_p=0.9).token, results[0].token[:2])
    others = [logit_stats(logits, seed=s).token for s in range(4)]
    assert len({tuple(token.tolist()) for token in others}) == 4


def test_errors_name_the_argument(gpu):
    logits = torch.randn(2, 5, device=gpu)
    with pytest.raises(ValueError, match="temperature: expected a finite number"):
        logit_stats(logits, temperature=-1.0)
    with pytest.raises(ValueError, match=r"mask: expected one for each row"):
        logit_stats(logits, mask=torch.ones(3, dtype=torch.bool, device=gpu))
