"""next_temperature against bisection in float64, and its promises."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torch_winnow import reference
from torch_winnow.resampling import (
    conditional_effective_sample_size,
    effective_sample_size,
    next_temperature,
)

INF = float("inf")
NAN = float("nan")
SHAPES = {
    "normal": lambda g: g,
    "square": lambda g: -g * g,
    "cube": lambda g: g**3,
    "two values": lambda g: (g > 1).to(g.dtype),
}


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("carried", [False, True], ids=["equal", "carried"])
def test_matches_definition(kind, carried, dtype):
    g = torch.randn(1, 2, 75)
    log_weights = (3 * torch.randn(1, 2, 75)).to(dtype) if carried else None
    for scale in (1e-3, 1.0, 1e4):
        log_likelihood = (scale * SHAPES[kind](g)).to(dtype)
        for target in (0.05, 0.5, 0.99):
            options = {"log_weights": log_weights}
            result = next_temperature(log_likelihood, 0.0, target, **options)
            assert result.dtype == torch.float32
            expected = reference.next_temperature(log_likelihood, 0.0, target, **options)
            # A share of 0.99 is 1 less what float sums round: its root is known less well.
            torch.testing.assert_close(
                result, expected, rtol=3e-5 if target > 0.9 else 3e-6, atol=0
            )


def test_double_is_double():
    log_likelihood = 30 * torch.randn(2, 70, dtype=torch.float64)
    for log_weights in (None, torch.randn(2, 70, dtype=torch.float64)):
        result = next_temperature(log_likelihood, 0.25, 0.7, log_weights=log_weights)
        expected = reference.next_temperature(log_likelihood, 0.25, 0.7, log_weights=log_weights)
        torch.testing.assert_close(result - 0.25, expected - 0.25, rtol=1e-10, atol=0)


def test_the_size_at_the_result_is_the_target():
    log_likelihood = 50 * torch.randn(20, 400)
    log_weights = torch.randn(20, 400)
    beta = next_temperature(log_likelihood, 0.0, 0.6)
    size = effective_sample_size(beta.unsqueeze(-1) * log_likelihood)
    torch.testing.assert_close(size, torch.full((20,), 240.0), rtol=1e-4, atol=0)
    beta = next_temperature(log_likelihood, 0.0, 0.6, log_weights=log_weights)
    size = conditional_effective_sample_size(log_weights, beta.unsqueeze(-1) * log_likelihood)
    torch.testing.assert_close(size, torch.full((20,), 240.0), rtol=1e-4, atol=0)


@pytest.mark.parametrize("wide", [torch.float32, torch.float64])
@pytest.mark.parametrize("carried", [False, True], ids=["equal", "carried"])
def test_reaches_the_end_exactly(wide, carried, cpu_capability):
    for values in (
        [0.1, 0.2, 0.3],  # far from the target at any step
        [-7.0] * 5,
        [-INF] * 4,
        [NAN] * 2,
        [INF, INF, 0.0, -5.0],
        [INF, 0.0, 0.0, 0.0, 0.0],  # the infinite one is all there is, at any step
        [2.0],
        [],
    ):
        log_likelihood = torch.tensor(values, dtype=wide)
        log_weights = torch.zeros_like(log_likelihood) if carried else None
        for beta, end in ((0.0, 1.0), (0.3, 0.7), (0.1, 1.0)):
            result = next_temperature(
                log_likelihood, beta, 0.5, log_weights=log_weights, max_beta=end
            )
            assert result.item() == torch.tensor(end, dtype=wide).item(), (values, beta)
    assert next_temperature(torch.tensor([0.0, 99.0]), 1.5, 0.9).item() == 1.5  # nothing to do


def test_weights_of_none_or_of_all():
    log_likelihood = torch.tensor([0.0, -40.0, -80.0, 30.0])
    nobody = torch.full((4,), -INF)
    assert next_temperature(log_likelihood, 0.0, 0.9, log_weights=nobody).item() == 1.0
    some = torch.tensor([2.0, 2.0, 2.0, -INF])
    infinite = torch.tensor([INF, INF, INF, 5.0])
    expected = next_temperature(log_likelihood, 0.0, 0.6, log_weights=some)
    assert expected < 0.1
    assert next_temperature(log_likelihood, 0.0, 0.6, log_weights=infinite) == expected


def test_the_dead_count_until_the_target_is_out_of_reach(cpu_capability):
    living = 20 * torch.randn(60)
    for dead in (-INF, NAN):
        some_dead = torch.cat([living, torch.full((40,), dead)])
        beta = next_temperature(some_dead, 0.0, 0.3)
        assert beta == pytest.approx(next_temperature(living, 0.0, 0.5).item(), rel=1e-6)
        size = effective_sample_size(beta * living)
        assert size.item() == pytest.approx(30.0, rel=1e-4)  # 0.3 of the hundred
        beta = next_temperature(some_dead, 0.0, 0.9)
        assert beta == pytest.approx(next_temperature(living, 0.0, 0.9).item(), rel=1e-6)


def test_always_moves_and_ends():
    log_likelihood = 1e6 * torch.randn(8, 50)
    beta, steps = torch.full((8,), 0.999999), 0
    while (beta < 1).any():
        after = next_temperature(log_likelihood, beta, 0.999)
        assert ((after > beta) | (beta == 1)).all()
        beta, steps = after, steps + 1
        assert steps < 100
    hardest = next_temperature(torch.tensor([0.0, -1.0]), 0.0, 1.0)
    assert 0 < hardest < 1e-30


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.floats(width=32) | st.sampled_from([0.0, -INF, INF, NAN, 3e38, -3e38, 1e-40]),
        min_size=1,
        max_size=40,
    ),
    st.lists(st.floats(0.001, 1.0), min_size=2, max_size=2),
    st.floats(0.0, 0.75, width=32),
    st.booleans(),
)
def test_monotone_in_the_target_and_within_bounds(values, targets, beta, carried):
    log_likelihood = torch.tensor(values)
    log_weights = torch.linspace(-3, 3, len(values)) if carried else None
    low, high = sorted(targets)
    near, far = (
        next_temperature(log_likelihood, beta, target, log_weights=log_weights).item()
        for target in (high, low)
    )
    assert beta < near <= 1.0
    assert beta < far <= 1.0
    # What dies at any step is counted in the share for one target and perhaps not for the other.
    if all(value > -INF for value in values):
        assert near <= far * (1 + 1e-6)


def test_beta_broadcasts_and_decides_the_dtype():
    log_likelihood = 10 * torch.randn(4, 3, 60)
    start = torch.tensor([0.0, 0.1, 0.2])
    result = next_temperature(log_likelihood, start, 0.5)
    for i in range(3):
        expected = next_temperature(log_likelihood[:, i], start[i].item(), 0.5)
        assert torch.equal(result[:, i], expected)
    assert next_temperature(log_likelihood, start.double(), 0.5).dtype == torch.float64
    assert next_temperature(log_likelihood.double(), start, 0.5).dtype == torch.float64


def test_bitwise_equal_everywhere(on_every_capability, on_thread_counts):
    x, w = 40 * torch.randn(2, 100, 133)
    for log_weights in (None, w):

        def call(log_weights=log_weights):
            return next_temperature(x, 0.0, 0.5, log_weights=log_weights)

        results = on_every_capability(call) + on_thread_counts(call)
        assert all(torch.equal(result, results[0]) for result in results)
        alone = torch.stack(
            [
                next_temperature(x[r], 0.0, 0.5, log_weights=None if log_weights is None else w[r])
                for r in (0, 57)
            ]
        )
        assert torch.equal(alone, results[0][[0, 57]])


def test_strided_and_empty():
    x = 10 * torch.randn(6, 50)[::2, 3:40]
    assert torch.equal(next_temperature(x, 0.0, 0.5), next_temperature(x.clone(), 0.0, 0.5))
    assert torch.equal(next_temperature(x.T, 0.0, 0.5), next_temperature(x.T.clone(), 0.0, 0.5))
    assert next_temperature(torch.empty(0, 4), 0.0, 0.5).shape == (0,)


def test_opcheck_and_compile():
    x = 20 * torch.randn(3, 20)
    for log_weights in (None, torch.randn(3, 20)):
        torch.library.opcheck(
            torch.ops.winnow.next_temperature.default, (x, torch.zeros(3), 0.5, 1.0, log_weights)
        )

    def call(x, beta):
        return next_temperature(x, beta, 0.5, log_weights=x / 10)

    compiled = torch.compile(call, fullgraph=True)
    assert torch.equal(compiled(x, torch.zeros(3)), call(x, torch.zeros(3)))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: next_temperature([1.0], 0.0, 0.5), "log_likelihood: .*got list"),
        (lambda x: next_temperature(x.long(), 0.0, 0.5), "log_likelihood: expected .*got int64"),
        (lambda x: next_temperature(x[0, 0], 0.0, 0.5), r"log_likelihood: .*got a scalar"),
        (lambda x: next_temperature(x, "0", 0.5), "beta: expected a number or a tensor, got str"),
        (lambda x: next_temperature(x, torch.zeros(3), 0.5), r"beta: .*\(2,\), got \(3,\)"),
        (lambda x: next_temperature(x, torch.tensor(0), 0.5), "beta: .*got torch.int64"),
        (lambda x: next_temperature(x, 0.0, 0.0), r"target_ess: .*\(0, 1\], got 0"),
        (lambda x: next_temperature(x, 0.0, NAN), r"target_ess: .*\(0, 1\], got nan"),
        (lambda x: next_temperature(x, 0.0, None), "target_ess: expected a number, got None"),
        (lambda x: next_temperature(x, 0.0, 0.5, max_beta=INF), "max_beta: .*finite.*got inf"),
        (
            lambda x: next_temperature(x, 0.0, 0.5, log_weights=x[:1]),
            r"log_weights: expected the shape of log_likelihood \(2, 5\), got \(1, 5\)",
        ),
        (
            lambda x: next_temperature(x, 0.0, 0.5, log_weights=x.double()),
            "log_weights: expected float32, got float64",
        ),
    ],
)
def test_errors_name_the_argument(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.randn(2, 5))
