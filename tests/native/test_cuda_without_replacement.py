"""Sampling without replacement on the GPU, against its definition and at its edges."""

from __future__ import annotations

import pytest
import torch

from torch_winnow import reference
from torch_winnow.resampling import inclusion_probabilities, sample_without_replacement

INF = float("inf")
NAN = float("nan")
DESIGNS = ("gumbel_topk", "pareto", "conditional_poisson")


@pytest.mark.parametrize("design", DESIGNS)
@pytest.mark.parametrize("wide", [torch.float32, torch.float64, torch.bfloat16])
def test_matches_definition(gpu, design, wide):
    most = (70, 9) if design == "conditional_poisson" else (300, 20)
    for particles, k in ((5, 2), (9, 8), (9, 9), (33, 0), (40, 11), most):
        log_weights = (2 * torch.randn(2, 1, particles)).to(wide)
        log_weights[1, 0, 3] = -INF
        options = {"design": design, "seed": 3}
        result = sample_without_replacement(log_weights.to(gpu), k, **options)
        expected = reference.sample_without_replacement(log_weights, k, **options)
        for value, definition in zip(result, expected, strict=True):
            torch.testing.assert_close(value.cpu(), definition, rtol=2e-6, atol=1e-9)


@pytest.mark.parametrize("design", DESIGNS)
def test_edges(gpu, design):
    for log_weights, k, expected in (
        ([0.0, -INF, NAN, 1.0], 2, {0, 3}),
        ([0.0, -INF, NAN, 1.0], 4, {0, 3, -1}),
        ([-INF, NAN, -INF], 2, {-1}),
        ([INF, 5.0, INF, 900.0], 2, {0, 2}),
        ([0.0, -1e30, -2e30, -3e30], 2, {0, 1}),
        ([3e38, 3e38, -3e38], 2, {0, 1}),
        ([0.0], 1, {0}),
    ):
        x = torch.tensor(log_weights, device=gpu)
        sample = sample_without_replacement(x, k, design=design, seed=1)
        assert set(sample.indices.tolist()) == expected, log_weights
        assert sample.weights.isfinite().all()
        assert (sample.weights[sample.indices < 0] == 0).all()


@pytest.mark.parametrize("design", DESIGNS)
def test_bitwise_equal_in_every_order(gpu, on_every_order, design):
    x = torch.randn(2, 300, device=gpu)
    seed = torch.tensor(5, device=gpu)
    results = on_every_order(lambda: sample_without_replacement(x, 20, design=design, seed=seed))
    for result in results:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))
    number = sample_without_replacement(x, 20, design=design, seed=5)
    assert torch.equal(number.indices, results[0].indices)


def test_inclusion_probabilities_match_definition(gpu):
    # k beyond a block's threads, and nine populations, more than the emulator runs at once.
    for shape, k in (((2, 20), 7), ((1, 20), 20), ((1, 20), 0), ((9, 6), 2), ((1, 290), 280)):
        log_weights = 4 * torch.randn(shape, dtype=torch.float64)
        log_weights[0, 1] = NAN
        result = inclusion_probabilities(log_weights.to(gpu), k)
        expected = reference.inclusion_probabilities(log_weights, k)
        torch.testing.assert_close(result.cpu(), expected, rtol=1e-11, atol=1e-14)


def test_inclusion_probabilities_at_edges(gpu):
    for log_weights, expected in (
        ([-INF, NAN, -INF], [0.0, 0.0, 0.0]),
        ([INF, 5.0, INF, 900.0], [1.0, 0.0, 1.0, 0.0]),
        ([INF, INF, INF, INF], [0.5, 0.5, 0.5, 0.5]),
        ([0.0, -3e38, -INF], [1.0, 1.0, 0.0]),
    ):
        result = inclusion_probabilities(torch.tensor(log_weights, device=gpu), 2)
        torch.testing.assert_close(result.cpu(), torch.tensor(expected))


def test_populations_that_blocks_share_are_sampled_as_alone(gpu):
    x = torch.randn(9, 12, dtype=torch.float64)
    sample = sample_without_replacement(x.to(gpu), 5, seed=3)
    expected = reference.sample_without_replacement(x, 5, design="conditional_poisson", seed=3)
    assert torch.equal(sample.indices.cpu(), expected.indices)


def test_inclusion_probabilities_are_bitwise_equal_in_every_order(gpu, on_every_order):
    x = torch.randn(2, 40, device=gpu)
    results = on_every_order(lambda: inclusion_probabilities(x, 9))
    assert all(torch.equal(result, results[0]) for result in results)
