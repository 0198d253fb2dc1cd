"""select_positions and unmask_step_ on the GPU, against their definitions."""

from __future__ import annotations

import pytest
import torch

from torch_winnow import reference
from torch_winnow._unmasking.rules import select
from torch_winnow.unmasking import (
    ConfidenceFactor,
    ConfidenceThreshold,
    EntropyBound,
    EntropyThreshold,
    PrefixThreshold,
    TopK,
    select_positions,
    unmask_step_,
)

RULES = [
    EntropyThreshold(0.4),
    EntropyThreshold(0.4, max_tokens=2),
    EntropyThreshold(0.6, order="left_to_right"),
    EntropyBound(0.5),
    ConfidenceThreshold(0.75),
    ConfidenceFactor(1.0),
    TopK(3, score="margin"),
    TopK((1, 5), score="entropy"),
    PrefixThreshold(0.25),
    PrefixThreshold(0.75, score="entropy"),
]


def check(score, mask, rule, **options):
    transfer, count = select_positions(score, mask, rule, **options)
    on_cpu = {k: v.cpu() if torch.is_tensor(v) else v for k, v in options.items()}
    expected, expected_count = reference.select_positions(score.cpu(), mask.cpu(), rule, **on_cpu)
    assert torch.equal(transfer.cpu(), expected)
    assert torch.equal(count.cpu(), expected_count)


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("length", [1, 40, 300])
@pytest.mark.parametrize("wide", [torch.float32, torch.float64])
def test_matches_definition(gpu, rule, length, wide):
    score = torch.rand(5, length, dtype=wide, device=gpu)
    mask = torch.rand(5, length, device=gpu) < torch.tensor([[0.0], [0.1], [0.5], [0.9], [1.0]]).to(
        gpu
    )
    check(score, mask, rule, step=1)
    window = torch.tensor([[0, 5], [-3, 30], [7, 7], [10, 500], [20, 25]], device=gpu)
    check(score, mask, rule, window=window)


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_ties_and_nans(gpu, rule):
    score = torch.tensor(
        [[0.3] * 6, [float("nan")] * 6, [0.9, float("nan"), 0.1, 0.9, float("nan"), 0.1]],
        device=gpu,
    )
    check(score, torch.ones(3, 6, dtype=torch.bool, device=gpu), rule)


def test_boundaries(gpu):
    score = torch.tensor([[0.9, 0.2, 0.9]], device=gpu)
    mask = torch.ones(1, 3, dtype=torch.bool, device=gpu)
    check(score, mask, ConfidenceThreshold(0.9))
    check(score, mask, EntropyThreshold(0.9))
    check(torch.tensor([[0.25, 0.5, 0.25]], device=gpu), mask, EntropyBound(0.5))


def test_a_floor_per_row_and_a_random_order(gpu, on_every_order):
    score = torch.rand(3, 280, device=gpu)
    mask = torch.ones(3, 280, dtype=torch.bool, device=gpu)
    least = torch.tensor([0, 7, 1000], device=gpu)
    seed = torch.tensor(5, device=gpu)
    for rule in (TopK(4, score="random"), EntropyThreshold(0.0)):
        results = on_every_order(
            lambda rule=rule: select(score, mask, rule, at_least=least, seed=seed)
        )
        assert results[0][1].tolist() == [1, 7, 280]
        assert all(torch.equal(result[0], results[0][0]) for result in results)
    rule = TopK(60, score="random")
    first, second = (select(score, mask, rule, seed=torch.tensor(s, device=gpu))[0] for s in (1, 2))
    assert not torch.equal(first, second)


def test_unmask_step(gpu):
    tokens = torch.randint(0, 90, (3, 20), device=gpu)
    tokens[:, 4:15] = 99
    logits = 3 * torch.randn(3, 20, 100, device=gpu)
    window = torch.tensor([[0, 10], [5, 20], [0, 4]], device=gpu)
    before = tokens.clone()
    result = unmask_step_(tokens, logits, mask_id=99, rule=EntropyThreshold(1.5), window=window)
    expected = before.cpu()
    transfer, count, _ = reference.unmask_step_(
        expected, logits.cpu(), mask_id=99, rule=EntropyThreshold(1.5), window=window.cpu()
    )
    assert torch.equal(tokens.cpu(), expected)
    assert torch.equal(result.transfer.cpu(), transfer)
    assert result.count.tolist() == count.tolist()
    assert result.count.tolist()[2] == 0


def test_errors_name_the_argument(gpu):
    score = torch.rand(2, 3, device=gpu)
    mask = torch.ones(2, 3, dtype=torch.bool, device=gpu)
    with pytest.raises(ValueError, match=r"mask: expected the shape of score"):
        select_positions(score, mask[:, :2], TopK(1))
    with pytest.raises(ValueError, match=r"window: expected \(B, 2\) with B=2"):
        select_positions(
            score, mask, TopK(1), window=torch.zeros(1, 2, dtype=torch.int64, device=gpu)
        )
