"""Sampling without replacement: definition, enumeration of every set, unbiased weights."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from torch_winnow import reference
from torch_winnow.resampling import inclusion_probabilities, sample_without_replacement

INF = float("inf")
NAN = float("nan")
DESIGNS = ("gumbel_topk", "conditional_poisson", "pareto")
WEIGHTS = torch.tensor([5.0, 4, 3, 2, 2, 1, 1, 0.5], dtype=torch.float64)


def set_probabilities(k: int) -> dict[tuple[int, ...], float]:
    """Conditional Poisson sampling by its definition."""
    sets = list(itertools.combinations(range(len(WEIGHTS)), k))
    products = torch.stack([WEIGHTS[list(chosen)].prod() for chosen in sets])
    return dict(zip(sets, (products / products.sum()).tolist(), strict=True))


def gumbel_set_probabilities(k: int) -> dict[tuple[int, ...], float]:
    """One draw after another, over every order."""
    total: dict[tuple[int, ...], float] = {}
    for order in itertools.permutations(range(len(WEIGHTS)), k):
        left, probability = WEIGHTS.sum().item(), 1.0
        for i in order:
            probability *= WEIGHTS[i].item() / left
            left -= WEIGHTS[i].item()
        chosen = tuple(sorted(order))
        total[chosen] = total.get(chosen, 0.0) + probability
    return total


@pytest.mark.parametrize("design", DESIGNS)
@pytest.mark.parametrize("wide", [torch.float32, torch.float64, torch.bfloat16])
def test_matches_definition(design, wide):
    for particles, k in ((5, 2), (9, 8), (9, 9), (9, 1), (40, 11), (33, 0), (130, 20)):
        log_weights = (2 * torch.randn(2, 1, particles)).to(wide)
        log_weights[1, 0, 3] = -INF
        result = sample_without_replacement(log_weights, k, design=design, seed=3)
        assert result.weights.dtype == (torch.float64 if wide == torch.float64 else torch.float32)
        expected = reference.sample_without_replacement(log_weights, k, design=design, seed=3)
        for value, definition in zip(result, expected, strict=True):
            torch.testing.assert_close(value, definition, rtol=2e-6, atol=1e-9)


def test_inclusion_probabilities_match_definition():
    for particles, k in ((5, 2), (20, 7), (20, 19), (20, 20), (20, 0), (64, 30)):
        log_weights = 4 * torch.randn(2, particles, dtype=torch.float64)
        result = inclusion_probabilities(log_weights, k)
        expected = reference.inclusion_probabilities(log_weights, k)
        torch.testing.assert_close(result, expected, rtol=1e-11, atol=1e-14)
        torch.testing.assert_close(result.sum(-1), torch.full((2,), float(k)).double())


@pytest.mark.parametrize("k", [1, 3, 7])
def test_inclusion_probabilities_by_enumeration(k):
    expected = torch.zeros_like(WEIGHTS)
    for chosen, probability in set_probabilities(k).items():
        expected[list(chosen)] += probability
    torch.testing.assert_close(inclusion_probabilities(WEIGHTS.log(), k), expected)


@pytest.mark.parametrize("design", ["conditional_poisson", "gumbel_topk"])
def test_sets_have_their_probabilities(design):
    """A chi-squared statistic of 55 degrees of freedom: above 95 once in 2000 seeds."""
    k, draws = 3, 40_000
    sample = sample_without_replacement(WEIGHTS.log().expand(draws, -1), k, design=design, seed=5)
    law = (set_probabilities if design == "conditional_poisson" else gumbel_set_probabilities)(k)
    assert sum(law.values()) == pytest.approx(1.0)
    index = {chosen: i for i, chosen in enumerate(law)}
    seen = torch.zeros(len(law), dtype=torch.float64)
    for chosen in sample.indices.sort(-1).values.tolist():
        seen[index[tuple(chosen)]] += 1
    expected = draws * torch.tensor(list(law.values()), dtype=torch.float64)
    assert ((seen - expected) ** 2 / expected).sum() < 95


@pytest.mark.parametrize("design", DESIGNS)
def test_horvitz_thompson_estimates_are_unbiased(design):
    """Means of 40 000 estimates: within 4 standard errors, and the error of pareto's target."""
    f = torch.tensor([1.0, -2, 3, 0, 5, -1, 2, 10], dtype=torch.float64)
    log_weights = WEIGHTS.log().expand(40_000, -1)
    sample = sample_without_replacement(log_weights, 4, design=design, seed=8)
    shares = WEIGHTS / WEIGHTS.sum()
    for values in (f, torch.ones_like(f)):
        estimates = (sample.weights * values[sample.indices]).sum(-1)
        exact = (shares * values).sum()
        error = 4 * estimates.std() / len(estimates) ** 0.5
        slack = 0.02 if design == "pareto" else 0.0
        assert (estimates.mean() - exact).abs() < error + slack


def test_pareto_inclusion_is_as_near_as_said():
    sample = sample_without_replacement(
        WEIGHTS.log().expand(200_000, -1), 4, design="pareto", seed=2
    )
    seen = torch.bincount(sample.indices.flatten(), minlength=8) / 200_000
    target = torch.zeros_like(WEIGHTS)
    target[sample.indices[:500]] = sample.inclusion_probabilities[:500]
    assert target.sum().item() == pytest.approx(4.0)
    assert target[0] == 1.0  # 4 times its share is more
    assert (seen - target).abs().max() < 0.003


def test_exact_weights_of_conditional_poisson():
    """The mean over every set, each with its own probability, is the population's exactly."""
    k = 3
    inclusion = inclusion_probabilities(WEIGHTS.log(), k)
    shares = WEIGHTS / WEIGHTS.sum()
    mean = sum(
        probability * (shares / inclusion)[list(chosen)].sum()
        for chosen, probability in set_probabilities(k).items()
    )
    assert mean == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("design", DESIGNS)
def test_edges(design):
    for log_weights, k, expected in (
        ([0.0, -INF, NAN, 1.0], 2, {0, 3}),
        ([0.0, -INF, NAN, 1.0], 4, {0, 3, -1}),
        ([-INF, NAN, -INF], 2, {-1}),
        ([INF, 5.0, INF, 900.0], 2, {0, 2}),
        ([INF, 5.0, INF], 3, {0, 2, -1}),
        ([0.0, -1e30, -2e30, -3e30], 2, {0, 1}),
        ([0.0, -3e38, -3e38, -INF], 3, {0, 1, 2}),
        ([3e38, 3e38, -3e38], 2, {0, 1}),
        ([0.0], 1, {0}),
        ([1.0, 2.0], 0, set()),
        ([], 0, set()),
    ):
        sample = sample_without_replacement(torch.tensor(log_weights), k, design=design, seed=1)
        assert set(sample.indices.tolist()) == expected, (log_weights, k)
        assert sample.indices[: sum(i >= 0 for i in expected)].ge(0).all()
        assert sample.weights.isfinite().all()
        missing = sample.indices < 0
        assert (sample.weights[missing] == 0).all()
        assert (sample.inclusion_probabilities[missing] == 0).all()
        assert ((sample.inclusion_probabilities > 0) | missing).all()


def test_ties_of_the_far_tail():
    """One of two particles whose weight is 0 in any floating number: each half of the time."""
    log_weights = torch.tensor([0.0, -1e9, -1e9]).expand(2000, -1)
    for design in DESIGNS:
        sample = sample_without_replacement(log_weights, 2, design=design, seed=4)
        assert (sample.indices == 0).any(-1).all()
        share = (sample.indices == 1).any(-1).double().mean()
        assert 0.45 < share < 0.55
    torch.testing.assert_close(
        inclusion_probabilities(log_weights[0], 2), torch.tensor([1.0, 0.5, 0.5])
    )


def test_large_populations_stay_stable():
    log_weights = 3 * torch.randn(20_000, dtype=torch.float64)
    for scale in (1.0, 100.0):
        inclusion = inclusion_probabilities(scale * log_weights, 400)
        assert inclusion.sum().item() == pytest.approx(400, rel=1e-10)
        assert ((inclusion >= 0) & (inclusion <= 1)).all()
        order = log_weights.argsort()
        assert (inclusion[order].diff() > -1e-12).all()  # a larger weight is likelier
        sample = sample_without_replacement(scale * log_weights, 400, seed=0)
        torch.testing.assert_close(
            sample.inclusion_probabilities, inclusion[sample.indices], rtol=1e-9, atol=0
        )
        assert (sample.indices.diff() > 0).all()


@pytest.mark.parametrize("design", DESIGNS)
def test_a_population_is_alone(design, on_every_capability, on_thread_counts):
    log_weights = torch.randn(40, 3, 77)

    def call():
        return sample_without_replacement(log_weights, 9, design=design, seed=6)

    results = on_every_capability(call) + on_thread_counts(call)
    for result in results[1:]:
        for a, b in zip(result, results[0], strict=True):
            assert torch.equal(a, b)
    others = torch.randn(40, 3, 77)
    others[7, 1] = log_weights[7, 1]
    alone = sample_without_replacement(others, 9, design=design, seed=6)
    assert torch.equal(alone.indices[7, 1], results[0].indices[7, 1])


@pytest.mark.parametrize("design", DESIGNS)
def test_strided_seeds_opcheck_and_compile(design):
    log_weights = torch.randn(6, 50)[::2, 3:40]
    a = sample_without_replacement(log_weights, 5, design=design, seed=7)
    b = sample_without_replacement(log_weights.clone(), 5, design=design, seed=torch.tensor(7))
    assert torch.equal(a.indices, b.indices)
    g = torch.Generator().manual_seed(1)
    c = sample_without_replacement(log_weights, 5, design=design, generator=g)
    assert c.indices.shape == (3, 5)
    torch.library.opcheck(
        torch.ops.winnow.sample_without_replacement.default,
        (log_weights, 5, design, 7, None),
    )

    def call(x):
        return sample_without_replacement(x, 5, design=design, seed=7), inclusion_probabilities(
            x, 5
        )

    sample, inclusion = torch.compile(call, fullgraph=True, backend="aot_eager")(log_weights)
    assert torch.equal(sample.indices, a.indices)
    assert torch.equal(inclusion, inclusion_probabilities(log_weights, 5))


def test_opcheck_of_inclusion_probabilities():
    torch.library.opcheck(torch.ops.winnow.inclusion_probabilities.default, (torch.randn(3, 20), 5))


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (([0.0], 1), {}, "log_weights: expected a floating tensor.*got list"),
        ((torch.zeros(3).long(), 1), {}, "log_weights: expected .*got int64"),
        ((torch.tensor(0.0), 1), {}, "log_weights: .*got a scalar"),
        ((torch.zeros(3), 4), {}, "k: expected 0 to K = 3, got 4"),
        ((torch.zeros(3), -1), {}, "k: expected 0 to K = 3, got -1"),
        ((torch.zeros(3), 1.0), {}, "k: expected an integer, got 1.0"),
        ((torch.zeros(3), 1), {"design": "poisson"}, "design: .*pareto, got 'poisson'"),
        ((torch.zeros(3), 1), {"design": None}, "design: expected a name, got NoneType"),
        ((torch.zeros(3), 1), {"seed": 0.5}, "seed: expected an int"),
    ],
)
def test_errors_name_the_argument(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        sample_without_replacement(*arguments, **options)


def test_every_design_is_one_of_gpus_too():
    with FakeTensorMode():
        log_weights = torch.zeros(2, 5, device="cuda")
        assert inclusion_probabilities(log_weights, 2).device.type == "cuda"
        for design in DESIGNS:
            drawn = sample_without_replacement(log_weights, 2, design=design, seed=0)
            assert drawn.indices.device.type == "cuda"
