"""Conditional resampling: one particle keeps its slot, the others follow the conditional law."""

from __future__ import annotations

import itertools

import pytest
import torch

from test_resampling_resample import assert_same
from torch_winnow import reference
from torch_winnow._resampling.resample import SCHEMES
from torch_winnow.resampling import effective_sample_size, resample

INF = float("inf")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_matches_definition(scheme):
    for shape in ((1,), (20, 3), (3, 2, 17), (2, 200)):
        log_weights = 2 * torch.randn(shape)
        pinned = torch.randint(shape[-1], shape[:-1])
        mask = torch.rand(shape) < 0.7
        for keep_slots, threshold, live in itertools.product(
            (False, True), (None, 0.5), (None, mask)
        ):
            options = {
                "scheme": scheme,
                "pinned": pinned,
                "keep_slots": keep_slots,
                "ess_threshold": threshold,
                "mask": live,
                "seed": 3,
            }
            result = resample(log_weights, **options)
            assert_same(result, reference.resample(log_weights, **options))
            kept = result.ancestors.gather(-1, pinned.unsqueeze(-1)).squeeze(-1)
            assert torch.equal(kept, pinned)
            assert (result.offspring.sum(-1) == shape[-1]).all()


@pytest.mark.parametrize("scheme", [scheme for scheme in SCHEMES if scheme != "killing"])
@pytest.mark.parametrize("samples", [5, 20])
def test_other_sample_counts(scheme, samples):
    log_weights = 2 * torch.randn(30, 10, dtype=torch.float64)
    options = {"scheme": scheme, "num_samples": samples, "pinned": 4, "seed": 1}
    result = resample(log_weights, **options)
    assert_same(result, reference.resample(log_weights, **options))
    assert (result.ancestors[:, 4] == 4).all()


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("shape", [(50, 64), (2, 30_000), (1, 100_000)])
def test_bitwise_equal_everywhere(scheme, shape, on_every_capability, on_thread_counts):
    log_weights = 2 * torch.randn(shape)
    pinned = torch.randint(shape[1], shape[:1])

    def call():
        return resample(log_weights, scheme=scheme, pinned=pinned, seed=1)

    results = on_every_capability(call) + on_thread_counts(call)
    for result in results:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))
    assert torch.equal(results[0].ancestors.gather(1, pinned[:, None])[:, 0], pinned)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("weightless", [-INF, float("nan"), -1e4])
def test_survives_without_weight(scheme, weightless):
    log_weights = torch.randn(50, 9)
    log_weights[:, 4] = weightless
    result = resample(log_weights, scheme=scheme, pinned=4, seed=0)
    assert (result.ancestors[:, 4] == 4).all()
    assert (result.offspring[:, 4] == 1).all()
    nothing = resample(torch.full((3, 5), -INF), scheme=scheme, pinned=2, seed=0)
    assert torch.equal(nothing.ancestors, torch.arange(5).expand(3, 5))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_weightless_survivor_brings_no_weight(scheme):
    """What lets a pinned particle survive is no weight of its own: the population as a whole stays
    properly weighted. The definition finds it however light it is, and wherever it lies."""
    for pinned, least in itertools.product((0, 3, 6), (-INF, -900.0)):
        log_weights = torch.tensor([0.0, -1.0, 0.0, 0.0, -1.0, 0.0, 0.0], dtype=torch.float64)
        log_weights[pinned] = least
        options = {"scheme": scheme, "pinned": pinned}
        for seed in range(20):
            result = resample(log_weights, seed=seed, **options)
            expected = reference.resample(log_weights, seed=seed, **options)
            assert result.ancestors[pinned] == expected.ancestors[pinned] == pinned
            torch.testing.assert_close(result.log_weights, expected.log_weights)
            if scheme == "optimal":
                total = (result.log_weights - result.log_weights.logsumexp(-1))[pinned]
                assert total == pytest.approx(least - log_weights.logsumexp(-1).item())


def occurrences(pinned, offspring, base):
    """How often each pair of pinned particle and offspring occurs."""
    digits = torch.cat([pinned.unsqueeze(-1), offspring], -1)
    code = (digits * base ** torch.arange(digits.shape[-1])).sum(-1)
    return torch.bincount(code, minlength=base ** digits.shape[-1]).double()


def slot_law(scheme, weights, samples):
    """The law of the particle in a uniform slot."""
    if scheme != "optimal":
        return weights
    low, high = 0.0, 1.0  # of the threshold c with sum min(1, w / c) = M
    for _ in range(60):
        c = (low + high) / 2
        low, high = (c, high) if (weights / c).clamp(max=1).sum() > samples else (low, c)
    return (weights / c).clamp(max=1) / samples


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(
    "weights", [[0.55, 0.05, 0.3, 0.1], [0.26, 0.24, 0.25, 0.25], [0.1, 0.0, 0.7, 0.2]]
)
def test_conditional_law(scheme, weights):
    """The ancestor b of a uniform slot together with all offspring: drawn from the scheme itself,
    or b first, from its marginal, and the offspring given b. Some 50 frequencies of 200000
    populations each, within 5 sigma: an error rate below 1e-4."""
    populations, particles = 200_000, len(weights)
    samples = 2 if scheme == "optimal" else particles
    weights = torch.tensor(weights, dtype=torch.float64)
    log_weights = weights.log().expand(populations, particles)
    free = resample(log_weights, scheme=scheme, num_samples=samples, seed=1)
    slot = torch.randint(samples, (populations, 1))
    b = free.ancestors.gather(1, slot).squeeze(1)
    has_slot = b < samples
    expected = occurrences(b[has_slot], free.offspring[has_slot], 5)
    b = torch.multinomial(slot_law(scheme, weights, samples), populations, replacement=True)
    has_slot = b < samples
    given = resample(
        log_weights[has_slot], scheme=scheme, num_samples=samples, pinned=b[has_slot], seed=2
    )
    result = occurrences(b[has_slot], given.offspring, 5)
    assert expected.gt(1000).any()
    assert ((result - expected).abs() <= 5 * (result + expected + 1).sqrt()).all()


def test_ascending_copies_are_rotated():
    """Any copy of the pinned particle lies in its slot with the same probability; 5 sigma."""
    weights = torch.tensor([0.1, 0.7, 0.1, 0.1]).log().expand(20_000, 4)
    for scheme in ("systematic", "stratified", "residual", "ssp"):
        result = resample(weights, scheme=scheme, pinned=1, seed=0)
        three = result.ancestors[result.offspring[:, 1] == 3]
        other = (three != 1).int().argmax(-1)  # the slot of the one that is not a copy
        count = torch.bincount(other, minlength=4).double()
        assert count[1] == 0
        each = len(three) / 3
        assert ((count[[0, 2, 3]] - each).abs() < 5 * each**0.5).all()


STATES = 2
START = torch.tensor([0.6, 0.4], dtype=torch.float64)
MOVE = torch.tensor([[0.8, 0.2], [0.3, 0.7]], dtype=torch.float64)
SEEN = torch.tensor([[0.9, 0.2], [0.1, 0.6], [0.7, 0.3]], dtype=torch.float64)  # [time, state]


def posterior():
    """Probabilities of the eight paths of a hidden Markov chain of three steps."""
    paths = torch.cartesian_prod(*[torch.arange(STATES)] * 3)
    weight = START[paths[:, 0]] * SEEN[0, paths[:, 0]]
    for t in (1, 2):
        weight = weight * MOVE[paths[:, t - 1], paths[:, t]] * SEEN[t, paths[:, t]]
    return paths, weight / weight.sum()


@pytest.mark.parametrize("scheme", [scheme for scheme in SCHEMES if scheme != "optimal"])
@pytest.mark.parametrize("keep_slots", [False, True])
def test_conditional_smc_leaves_the_posterior_invariant(scheme, keep_slots):
    """From exact draws of the path, one step of the conditional filter with three particles gives
    draws of the same law. Eight frequencies of 200000 chains; 5 sigma."""
    chains, particles = 200_000, 3
    paths, law = posterior()
    reference_path = paths[torch.multinomial(law, chains, replacement=True)]
    rows = torch.arange(chains)
    pinned = torch.randint(particles, (chains,))
    x = torch.multinomial(START, chains * particles, replacement=True).view(chains, particles)
    x[rows, pinned] = reference_path[:, 0]
    history = x.unsqueeze(-1)
    for t in (0, 1, 2):
        # The order of the particles is arbitrary; schemes that look at it see a random one: any,
        # where slots are kept, else a rotation is enough.
        turn = (torch.arange(particles) + torch.randint(particles, (chains, 1))) % particles
        if keep_slots:
            turn = torch.rand(chains, particles).argsort(-1)
        history = history.gather(1, turn.unsqueeze(-1).expand_as(history))
        pinned = (turn == pinned.unsqueeze(1)).int().argmax(-1)
        log_weights = SEEN[t][history[..., -1]].log()
        if t == 2:
            break
        ancestors = resample(
            log_weights, scheme=scheme, pinned=pinned, keep_slots=keep_slots, seed=t
        ).ancestors
        history = history.gather(1, ancestors.unsqueeze(-1).expand_as(history))
        x = torch.multinomial(MOVE[history[..., -1].flatten()], 1).view(chains, particles)
        x[rows, pinned] = reference_path[:, t + 1]
        history = torch.cat([history, x.unsqueeze(-1)], -1)
    chosen = torch.multinomial(log_weights.exp(), 1).squeeze(1)
    code = (history[rows, chosen] * torch.tensor([4, 2, 1])).sum(-1)
    count = torch.bincount(code, minlength=8).double()
    assert ((count - chains * law).abs() < 5 * (chains * law * (1 - law)).sqrt()).all()
    moved = (history[rows, chosen] != reference_path).any(-1)
    assert 0.2 < moved.double().mean() < 0.9


def test_not_triggered_keeps_everything():
    log_weights = 0.1 * torch.randn(5, 8)
    result = resample(log_weights, pinned=3, ess_threshold=0.5, seed=0)
    assert not result.resampled.any()
    assert torch.equal(result.ancestors, torch.arange(8).expand(5, 8))
    assert torch.equal(result.ess, effective_sample_size(log_weights))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pinned": 5}, "pinned: expected a particle below K = 5 and M = 5, got 5"),
        ({"pinned": -1}, "pinned: expected a particle below .*got -1"),
        ({"pinned": torch.tensor([0, 7, 1])}, "pinned: expected a particle below .*got 7"),
        ({"pinned": 3, "num_samples": 2}, "pinned: expected a particle below K = 5 and M = 2"),
        ({"pinned": 1.0}, "pinned: expected an int or an int64 tensor, got float"),
        ({"pinned": torch.zeros(3)}, r"pinned: expected int64 of shape \(3,\) or \(\)"),
        ({"pinned": torch.zeros(2).long()}, r"pinned: expected int64 .*got .*\(2,\)"),
        ({"pinned": 1, "uniforms": torch.rand(3)}, "uniforms: expected None with pinned"),
    ],
)
def test_errors_name_the_argument(options, message):
    with pytest.raises(ValueError, match=message):
        resample(torch.zeros(3, 5), **options)
