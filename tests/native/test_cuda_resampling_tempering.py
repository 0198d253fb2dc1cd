"""Statistics of weights and next_temperature on the GPU, against definition and edges."""

from __future__ import annotations

import math

import pytest
import torch

from conftest import TOLERANCE
from torch_winnow import reference
from torch_winnow.resampling import (
    conditional_effective_sample_size,
    log_mean_exp,
    next_temperature,
    weight_entropy,
)

INF = float("inf")
NAN = float("nan")
STATISTICS = (weight_entropy, log_mean_exp)


@pytest.mark.parametrize("shape", [(1,), (33,), (9, 64), (2, 513), (0, 4), (2, 0)])
@pytest.mark.parametrize("function", STATISTICS, ids=lambda f: f.__name__)
def test_statistics_match_definition(gpu, shape, dtype, function):
    log_weights = (3 * torch.randn(shape)).to(gpu, dtype)
    expected = getattr(reference, function.__name__)(log_weights.double().cpu())
    result = function(log_weights)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result.double().cpu(), expected, **TOLERANCE[torch.float32])


@pytest.mark.parametrize("padding", [0, 600], ids=["warp", "block"])
@pytest.mark.parametrize(
    ("weights", "entropy", "total"),
    [
        ([0.0] * 7, math.log(7), math.log(7)),
        ([1e30, 1e30, -1e30], math.log(2), 1e30),
        ([-INF] * 3, 0.0, -INF),
        ([0.0, NAN, 0.0, -INF], math.log(2), math.log(2)),
        ([INF, 5.0, INF, NAN], math.log(2), INF),
        ([-3e38, -INF], 0.0, -3e38),
    ],
)
@pytest.mark.parametrize("wide", [torch.float32, torch.float64])
def test_edges_of_statistics(gpu, weights, entropy, total, wide, padding):
    log_weights = torch.tensor([*weights, *[-INF] * padding], dtype=wide, device=gpu)
    assert weight_entropy(log_weights).item() == pytest.approx(entropy, abs=1e-6)
    mean = log_mean_exp(log_weights).item()
    assert mean == pytest.approx(total - math.log(len(log_weights)), rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("particles", [1, 5, 70, 1300])
@pytest.mark.parametrize("carried", [False, True], ids=["equal", "carried"])
def test_temperatures_match_definition(gpu, particles, carried, dtype):
    log_likelihood = (20 * torch.randn(2, particles)).to(dtype)
    log_weights = (2 * torch.randn(2, particles)).to(dtype) if carried else None
    expected = reference.next_temperature(log_likelihood, 0.0, 0.5, log_weights=log_weights)
    on_gpu = log_weights.to(gpu) if carried else None
    result = next_temperature(log_likelihood.to(gpu), 0.0, 0.5, log_weights=on_gpu)
    torch.testing.assert_close(result.cpu(), expected, rtol=1e-6, atol=0)
    if carried:
        expected = reference.conditional_effective_sample_size(log_weights, log_likelihood)
        result = conditional_effective_sample_size(on_gpu, log_likelihood.to(gpu))
        torch.testing.assert_close(result.cpu(), expected, **TOLERANCE[torch.float32])


def test_temperatures_in_double(gpu):
    log_likelihood = 30 * torch.randn(2, 40, dtype=torch.float64)
    result = next_temperature(log_likelihood.to(gpu), 0.25, 0.7)
    expected = reference.next_temperature(log_likelihood, 0.25, 0.7)
    torch.testing.assert_close(result.cpu() - 0.25, expected - 0.25, rtol=1e-10, atol=0)


@pytest.mark.parametrize("carried", [False, True], ids=["equal", "carried"])
def test_edges_of_temperatures(gpu, carried):
    for values in ([0.1, 0.2], [-7.0] * 5, [-INF] * 4, [NAN] * 2, [INF, INF, 0.0], [2.0], []):
        x = torch.tensor(values, device=gpu)
        log_weights = torch.zeros_like(x) if carried else None
        result = next_temperature(x, 0.3, 0.5, log_weights=log_weights, max_beta=0.7)
        assert result.item() == torch.tensor(0.7).item(), values
    living = 20 * torch.randn(60, device=gpu)
    some_dead = torch.cat([living, torch.full((40,), -INF, device=gpu)])
    log_weights = torch.zeros_like(some_dead) if carried else None
    beta = next_temperature(some_dead, 0.0, 0.3, log_weights=log_weights).item()
    assert beta == pytest.approx(next_temperature(living, 0.0, 0.5).item(), rel=1e-6)
    beta = next_temperature(some_dead, 0.0, 0.9, log_weights=log_weights).item()
    assert beta == pytest.approx(next_temperature(living, 0.0, 0.9).item(), rel=1e-6)


def test_bitwise_equal_in_every_order(gpu, on_every_order):
    x, w = 20 * torch.randn(2, 2, 1300, device=gpu)
    for call in (
        lambda: next_temperature(x, 0.0, 0.5, log_weights=w),
        lambda: conditional_effective_sample_size(w, x),
        lambda: weight_entropy(x),
    ):
        results = on_every_order(call)
        assert all(torch.equal(result, results[0]) for result in results)


def test_errors_name_the_argument(gpu):
    x = torch.zeros(2, 3, device=gpu)
    with pytest.raises(ValueError, match=r"target_ess: expected a share"):
        next_temperature(x, 0.0, 2.0)
    with pytest.raises(ValueError, match=r"log_weights: expected the shape of log_likelihood"):
        next_temperature(x, 0.0, 0.5, log_weights=x[:, :2])
    with pytest.raises(ValueError, match=r"log_increments: expected float32"):
        conditional_effective_sample_size(x, x.double())
