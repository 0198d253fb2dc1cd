"""Entropy, mean, shares and conditional effective sample size of weights: definition and edges."""

from __future__ import annotations

import math

import pytest
import torch

from conftest import TOLERANCE
from torch_winnow import reference
from torch_winnow.resampling import (
    conditional_effective_sample_size,
    effective_sample_size,
    log_mean_exp,
    normalised_weights,
    resample,
    weight_entropy,
)

INF = float("inf")
NAN = float("nan")
SHAPES = [(1,), (15,), (16,), (17,), (3, 64), (2, 3, 1000), (2, 9000), (0, 4), (2, 0)]
STATISTICS = {
    function.__name__: function for function in (weight_entropy, log_mean_exp, normalised_weights)
}
ops = torch.ops.winnow


@pytest.mark.parametrize("name", STATISTICS)
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_definition(name, shape, dtype):
    log_weights = (3 * torch.randn(shape)).to(dtype)
    result = STATISTICS[name](log_weights)
    assert result.dtype == torch.float32
    expected = getattr(reference, name)(log_weights.double())
    torch.testing.assert_close(result.double(), expected, **TOLERANCE[torch.float32])


@pytest.mark.parametrize("shape", SHAPES)
def test_conditional_matches_definition(shape, dtype):
    log_weights = (3 * torch.randn(shape)).to(dtype)
    log_increments = (2 * torch.randn(shape)).to(dtype)
    result = conditional_effective_sample_size(log_weights, log_increments)
    assert result.dtype == torch.float32
    expected = reference.conditional_effective_sample_size(log_weights, log_increments)
    torch.testing.assert_close(result, expected.float(), **TOLERANCE[torch.float32])


def test_double_is_double(cpu_capability):
    log_weights = 20 * torch.randn(3, 500, dtype=torch.float64)
    log_increments = 20 * torch.randn(3, 500, dtype=torch.float64)
    for name, function in STATISTICS.items():
        expected = getattr(reference, name)(log_weights)
        torch.testing.assert_close(function(log_weights), expected, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(
        conditional_effective_sample_size(log_weights, log_increments),
        reference.conditional_effective_sample_size(log_weights, log_increments),
        rtol=1e-12,
        atol=0,
    )


@pytest.mark.parametrize(
    ("weights", "entropy", "mean"),
    [
        ([0.0] * 7, math.log(7), 0.0),
        ([1e30, 1e30, -1e30], math.log(2), 1e30),
        ([-INF] * 3, 0.0, -INF),
        ([NAN] * 2, 0.0, -INF),
        ([0.0, NAN, 0.0, -INF], math.log(2), math.log(0.5)),
        ([INF, 5.0, INF, NAN], math.log(2), INF),
        ([-3e38, -INF], 0.0, -3e38),
    ],
)
@pytest.mark.parametrize("wide", [torch.float32, torch.float64])
def test_edges(weights, entropy, mean, wide, cpu_capability):
    log_weights = torch.tensor(weights, dtype=wide)
    for module in (reference, None):
        of = STATISTICS if module is None else {name: getattr(module, name) for name in STATISTICS}
        assert of["weight_entropy"](log_weights).item() == pytest.approx(entropy, abs=1e-6)
        assert of["log_mean_exp"](log_weights).item() == pytest.approx(mean, rel=1e-6, abs=1e-7)
        shares = of["normalised_weights"](log_weights)
        assert shares.sum().item() == pytest.approx(1.0 if mean > -INF else 0.0)


@pytest.mark.parametrize(
    ("weights", "increments", "expected"),
    [
        ([0.0, -5.0, -9.0], [2.0] * 3, 3.0),  # equal increments change nothing
        ([0.0, 0.0, 0.0, 0.0], [0.0, 0.0, -INF, NAN], 2.0),
        ([0.0, 0.0, -INF, NAN], [0.0, 0.0, 1e30, INF], 4.0),  # only what has weight matters
        ([0.0, 0.0, 0.0, 0.0], [INF, 3.0, 0.0, 0.0], 1.0),
        ([INF, INF, 0.0, 0.0], [0.0, -INF, 9.0, 9.0], 2.0),
        ([0.0, -1000.0], [0.0, 900.0], 2 * math.exp(-800)),  # a light particle takes over
        ([-INF, -INF], [0.0, 0.0], 0.0),
        ([0.0, 0.0], [-INF, NAN], 0.0),
        ([], [], 0.0),
    ],
)
@pytest.mark.parametrize("wide", [torch.float32, torch.float64])
def test_conditional_edges(weights, increments, expected, wide, cpu_capability):
    pair = torch.tensor(weights, dtype=wide), torch.tensor(increments, dtype=wide)
    for function in (
        conditional_effective_sample_size,
        reference.conditional_effective_sample_size,
    ):
        assert function(*pair).item() == pytest.approx(expected, rel=1e-6, abs=1e-30)


def test_conditional_is_the_plain_size_for_equal_weights():
    log_increments = torch.randn(5, 300)
    torch.testing.assert_close(
        conditional_effective_sample_size(torch.full((5, 300), 7.0), log_increments),
        effective_sample_size(log_increments),
    )


@pytest.mark.parametrize("wide", [torch.float32, torch.bfloat16, torch.float64])
def test_mean_is_what_resample_divides_out(wide, cpu_capability):
    # Above 16 particles: smaller populations are weighed across lanes, in another order.
    for shape in ((5, 300), (2, 20_000)):
        log_weights = (3 * torch.randn(shape)).to(wide)
        assert torch.equal(log_mean_exp(log_weights), resample(log_weights, seed=0).log_z)


def test_strided_inputs():
    x, y = torch.randn(2, 6, 50)[..., ::2, 3:40].unbind(0)
    for function in (weight_entropy, log_mean_exp):
        assert torch.equal(function(x), function(x.clone()))
        assert torch.equal(function(x.T), function(x.T.contiguous()))
    expected = conditional_effective_sample_size(x.clone(), y.clone())
    assert torch.equal(conditional_effective_sample_size(x, y), expected)


def test_bitwise_equal_everywhere(on_every_capability, on_thread_counts):
    x, y = torch.randn(2, 200, 333)
    for call in (
        lambda: weight_entropy(x),
        lambda: log_mean_exp(x),
        lambda: conditional_effective_sample_size(x, y),
    ):
        results = on_every_capability(call) + on_thread_counts(call)
        assert all(torch.equal(result, results[0]) for result in results)


def test_opcheck_and_compile():
    x, y = torch.randn(2, 3, 20)
    torch.library.opcheck(ops.weight_entropy.default, (x,))
    torch.library.opcheck(ops.log_mean_exp.default, (x,))
    torch.library.opcheck(ops.conditional_effective_sample_size.default, (x, y))

    def everything(x, y):
        return (
            weight_entropy(x) + log_mean_exp(x) + conditional_effective_sample_size(x, y),
            normalised_weights(x),
        )

    compiled = torch.compile(everything, fullgraph=True)
    for result, expected in zip(compiled(x, y), everything(x, y), strict=True):
        torch.testing.assert_close(result, expected)


@pytest.mark.parametrize("name", STATISTICS)
def test_errors_name_the_argument(name):
    function = STATISTICS[name]
    with pytest.raises(ValueError, match=r"log_weights: expected a floating tensor.*got list"):
        function([0.0, 1.0])
    with pytest.raises(ValueError, match=r"log_weights: expected .*got .*int64"):
        function(torch.ones(3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"log_weights: expected .*\(\.\.\., K\), got "):
        function(torch.tensor(1.0))


def test_errors_of_the_conditional_size():
    x = torch.zeros(3)
    with pytest.raises(ValueError, match="log_increments: expected a floating tensor.*got float"):
        conditional_effective_sample_size(x, 1.0)
    with pytest.raises(ValueError, match=r"log_increments: expected the shape .*\(3,\).*\(2,\)"):
        conditional_effective_sample_size(x, torch.zeros(2))
    with pytest.raises(ValueError, match="log_increments: expected float32, got float64"):
        conditional_effective_sample_size(x, x.double())
