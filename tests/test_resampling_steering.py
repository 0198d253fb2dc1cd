"""Feynman-Kac potentials and FKSteering against exact answers."""

from __future__ import annotations

import numpy
import pytest
import torch
import torch.nn.functional as F

from torch_winnow import reference
from torch_winnow._resampling.steering import _step_key
from torch_winnow.resampling import (
    FKSteering,
    effective_sample_size,
    fk_potential,
    gather_particles,
    resample,
)

INF = float("inf")
KINDS = ("difference", "max", "sum")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lmbda", [0.0, 1.0, 10.0])
def test_potential_matches_definition(kind, lmbda):
    state = expected_state = None
    for step in range(5):
        reward = torch.randn(3, 6, dtype=torch.float64)
        reward[0, step] = (-INF, float("nan"), 50.0, -50.0, 0.0)[step]
        reward[1, step] = INF
        reward[2, 0] = (INF, 1.0, -INF, 0.0, INF)[step]
        options = {"kind": kind, "lmbda": lmbda, "terminal": step == 4}
        log_potential, state = fk_potential(reward, state, **options)
        expected, expected_state = reference.fk_potential(reward, expected_state, **options)
        torch.testing.assert_close(log_potential, expected)
        torch.testing.assert_close(state.reward, expected_state.reward)
        torch.testing.assert_close(state.log_product, expected_state.log_product)
        assert not state.log_product.isnan().any()


@pytest.mark.parametrize("kind", KINDS)
def test_product_is_the_tilt_of_the_terminal_reward(kind):
    """Not of the running maximum, nor of the sum: whatever the way was."""
    rewards = torch.randn(6, 4, 8, dtype=torch.float64) * 3 - 2
    state, total = None, torch.zeros(4, 8, dtype=torch.float64)
    for step, reward in enumerate(rewards):
        log_potential, state = fk_potential(reward, state, kind=kind, lmbda=2.5, terminal=step == 5)
        total += log_potential
    torch.testing.assert_close(total, 2.5 * rewards[-1])


def test_potential_dtypes():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        log_potential, state = fk_potential(torch.ones(3, dtype=dtype), None, kind="sum", lmbda=1.0)
        assert log_potential.dtype == state.reward.dtype == torch.float32


def test_an_adaptive_step_remembers_its_weight():
    """The published class forgets the weights of a step that does not resample."""
    steering = FKSteering("difference", lmbda=1.0, ess_threshold=0.5)
    good = torch.tensor([True, True, False, False])
    for level in (1.2, 2.4):
        result = steering.step(torch.where(good, level, 0.0))
        assert not result.resampled
        assert torch.equal(result.ancestors, torch.arange(4))
    assert steering.weights[good].sum().item() == pytest.approx(0.9168, abs=1e-4)


def test_large_rewards_are_not_clamped():
    """exp(24) .. exp(60) clamped at 1e10 would all weigh the same."""
    steering = FKSteering("difference", lmbda=10.0, seed=0)
    result = steering.step(torch.tensor([2.4, 3.0, 4.0, 6.0]))
    assert torch.equal(result.ancestors, torch.full((4,), 3))
    assert result.log_z.item() == pytest.approx(60 - torch.tensor(4.0).log().item())
    carried = FKSteering("difference", lmbda=10.0, ess_threshold=1e-9)
    carried.step(torch.tensor([2.4, 3.0, 4.0, 6.0]))
    torch.testing.assert_close(carried.weights, torch.tensor([24.0, 30.0, 40.0, 60.0]).softmax(-1))


@pytest.mark.parametrize("kind", KINDS)
def test_negative_rewards(kind):
    """The published sum potential crashes on them."""
    steering = FKSteering(kind, lmbda=3.0, ess_threshold=1e-9)
    for reward in ([-1.0, -5.0, -2.0], [-4.0, -0.5, -3.0]):
        steering.step(torch.tensor(reward))
    steering.step(torch.tensor([-1.0, -2.0, -1.5]), terminal=True)
    torch.testing.assert_close(steering.weights, torch.tensor([-3.0, -6.0, -4.5]).softmax(-1))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("threshold", [None, 0.5, 0.9])
@pytest.mark.parametrize("scheme", ["systematic", "killing", "optimal"])
def test_controller_matches_definition(kind, threshold, scheme):
    """Prompt by prompt, with broken constraints among the rewards and two runs of one object."""
    options = {"ess_threshold": threshold, "scheme": scheme, "seed": 3}
    ours = FKSteering(kind, 1.5, **options)
    expected = reference.FKSteering(kind, 1.5, **options)
    for run in range(2):
        rewards = torch.randn(5, 3, 2, 7, generator=torch.Generator().manual_seed(run))
        rewards[2, 0, 0, :3] = -INF
        rewards[3, 1, 0, 2] = float("nan")
        for step, reward in enumerate(rewards):
            result = ours.step(reward, terminal=step == 4)
            wanted = expected.step(reward, terminal=step == 4)
            assert torch.equal(result.resampled, wanted.resampled)
            assert torch.equal(result.ancestors, wanted.ancestors)
            torch.testing.assert_close(ours.weights, wanted.log_weights.softmax(-1))
            torch.testing.assert_close(ours.log_z, expected.log_z, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(ours.reward, expected.reward, equal_nan=True)
        assert torch.equal(ours.best(), expected.best())
        assert torch.equal(ours.select(rewards[0]), expected.select(rewards[0]))
        ours.reset()
        expected.reset()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("threshold", "scheme"),
    [
        (None, "systematic"),
        (0.75, "systematic"),
        (0.9, "systematic"),
        (0.75, "ssp"),
        (0.9, "killing"),
    ],
)
def test_steers_to_the_tilted_distribution(kind, threshold, scheme):
    """An enumerable chain: exp(log_z) times the weighted share of each end state estimates
    p(x) exp(lambda r(x)) without bias. 5 sigma over 160000 populations of 6: the 60 comparisons of
    all parameters fail by chance at most once in 10000 choices of the seeds.

    That rate needs a normal mean, so the rewards on the way are mild and the skewness is checked.
    Twice as large, the few heaviest populations of kind "sum" make the mean and its estimated sigma
    alike: where they are missing, a mean below -3 sigma is ten times as likely as a normal one.
    """
    lmbda = 1.5
    transition = torch.tensor([[0.7, 0.2, 0.1], [0.3, 0.4, 0.3], [0.1, 0.1, 0.8]])
    final = torch.tensor([1.0, -0.5, 0.3])
    target = torch.linalg.matrix_power(transition.double(), 3)[0] * (lmbda * final.double()).exp()
    masses = _tilted_masses(kind, threshold, scheme, transition, final, lmbda)
    estimate = torch.cat((masses, masses.sum(1, keepdim=True)), 1)
    exact = torch.cat((target, target.sum().view(1)))
    scaled = (estimate - estimate.mean(0)) / estimate.std(0)
    skewness_of_the_mean = (scaled**3).mean(0) / len(estimate) ** 0.5
    assert (skewness_of_the_mean.abs() < 0.02).all()
    sigma = estimate.std(0) / len(estimate) ** 0.5
    assert ((estimate.mean(0) - exact).abs() < 5 * sigma).all()
    assert (sigma < 0.006 * exact).all()  # a bias of 3% would be seen


def _tilted_masses(kind, threshold, scheme, transition, final, lmbda):
    """``(populations, states)``: every population's estimates of the tilted masses."""
    populations, particles, states = 160_000, 6, len(final)
    on_the_way = torch.tensor([[0.25, -0.5, 0.5], [0.0, 0.5, -0.25]])
    steering = FKSteering(kind, lmbda, ess_threshold=threshold, scheme=scheme, seed=5)
    generator = torch.Generator().manual_seed(1)

    x = torch.zeros(populations, particles, dtype=torch.int64)
    for step in range(3):
        u = torch.rand(x.shape, generator=generator)
        x = (u.unsqueeze(-1) > transition[x].cumsum(-1)).sum(-1).clamp(max=states - 1)
        reward = final[x] if step == 2 else on_the_way[step][x]
        result = steering.step(reward, terminal=step == 2)
        x = gather_particles(x, result.ancestors)
        assert torch.equal(steering.reward, gather_particles(reward, result.ancestors))
        if threshold == 0.75 and step == 1:
            assert result.resampled.any()
            assert not result.resampled.all()

    torch.testing.assert_close(
        steering.weights.sum(-1), torch.ones(populations), rtol=1e-5, atol=1e-5
    )
    shares = (steering.weights.unsqueeze(-1) * F.one_hot(x, states)).sum(-2)
    return steering.log_z.double().exp().unsqueeze(-1) * shares.double()


def test_draws_of_steps_runs_and_populations_are_independent():
    """Nor do they follow a torch generator of a small seed. With equal weights a multinomial draw
    is its uniform; 5.5 sigma over the 780 pairs of 40 streams: by chance once in 30000."""
    count, streams = 4096, []
    for seed in range(4):
        for step in range(3):
            key = _step_key(torch.tensor(seed), step)
            draws = resample(torch.zeros(3, count), scheme="multinomial", seed=key)
            streams += list(draws.ancestors.double())
        generator = torch.Generator().manual_seed(seed)
        streams.append(torch.rand(count, generator=generator, dtype=torch.float64))
    correlation = torch.corrcoef(torch.stack(streams))
    assert len(correlation) == 40
    assert (correlation - torch.eye(40)).abs().max() < 5.5 / count**0.5


@pytest.mark.parametrize("scheme", ["systematic", "stratified", "multinomial", "residual"])
@pytest.mark.parametrize("threshold", [None, 0.5])
def test_hidden_markov_model(scheme, threshold):
    """log_z over the steps of a bootstrap filter: exp of it is unbiased for the likelihood that the
    forward algorithm computes. 5 sigma over 20000 filters of 8 particles."""
    filters, particles = 20_000, 8
    transition = torch.tensor([[0.9, 0.1], [0.2, 0.8]])
    emission = torch.tensor([[0.8, 0.2], [0.3, 0.7]])
    observed = [0, 1, 1, 0, 1, 1]
    generator = torch.Generator().manual_seed(2)
    forward = torch.tensor([0.5, 0.5], dtype=torch.float64)
    x = (torch.rand(filters, particles, generator=generator) < 0.5).long()
    log_weights = torch.zeros(filters, particles)
    log_z = torch.zeros(filters, dtype=torch.float64)
    for step, y in enumerate(observed):
        if step > 0:
            forward = forward @ transition.double()
            x = (torch.rand(x.shape, generator=generator) < transition[x, 1]).long()
        forward = forward * emission.double()[:, y]
        log_weights = log_weights + emission[x, y].log()
        result = resample(log_weights, scheme=scheme, ess_threshold=threshold, seed=step)
        x = gather_particles(x, result.ancestors)
        log_weights, log_z = result.log_weights, log_z + result.log_z
    z = (log_z + log_weights.double().logsumexp(-1)).exp() / particles
    assert abs(z.mean() - forward.sum()) < 5 * z.std() / filters**0.5
    assert z.std() < forward.sum()


def test_prompts_are_independent_and_runs_repeat():
    rewards = torch.randn(4, 3, 5)

    def run(rewards, seed):
        steering = FKSteering("max", 2.0, seed=seed)
        return [steering.step(reward) for reward in rewards], steering

    both, steering = run(rewards, 3)
    alone, _ = run(rewards[:, :1], 3)
    again, _ = run(rewards, torch.tensor(3))
    for step in range(4):
        assert torch.equal(both[step].ancestors[:1], alone[step].ancestors)
        assert torch.equal(both[step].ancestors, again[step].ancestors)
    assert steering.log_weights.shape == (3, 5)
    assert steering.log_z.shape == (3,)
    torch.testing.assert_close(
        effective_sample_size(steering.log_weights), (steering.weights**2).sum(-1).reciprocal()
    )
    steering.reset()
    with pytest.raises(ValueError, match="no step has been taken"):
        _ = steering.weights
    assert steering.step(torch.randn(2, 7)).ancestors.shape == (2, 7)


def test_each_step_draws_anew():
    steering = FKSteering("difference", ess_threshold=None, scheme="multinomial", seed=0)
    first = steering.step(torch.zeros(100))
    second = steering.step(torch.zeros(100))
    assert not torch.equal(first.ancestors, second.ancestors)
    steering.reset()
    assert not torch.equal(steering.step(torch.zeros(100)).ancestors, first.ancestors)


def test_neighbouring_seeds_share_no_draws():
    """Nor does the run of one seed replay another's, shifted by a step."""
    rewards = torch.zeros(200)
    draws = []
    for seed in range(-3, 4):
        steering = FKSteering(ess_threshold=None, scheme="multinomial", seed=seed)
        draws += [tuple(steering.step(rewards).offspring.tolist()) for _ in range(6)]
    assert len(set(draws)) == len(draws) == 42


def test_keys_of_numbers_and_tensors_are_the_same():
    for seed in (0, 1, -1, 7, 2**63 - 1, -(2**63)):
        for step in (0, 1, 2, 1000):
            key = _step_key(seed, step)
            assert key == _step_key(torch.tensor(seed), step).item()
            assert -(2**63) <= key < 2**63
    assert _step_key(0, 0) == 0xE220A8397B1DCDAF - 2**64  # splitmix64's first number from 0


def test_seeds_of_any_kind_of_integer():
    rewards = torch.randn(3, 9)
    results = [
        FKSteering(scheme="multinomial", ess_threshold=None, seed=seed).step(rewards).ancestors
        for seed in (7, numpy.int64(7), torch.tensor(7))
    ]
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    for seed in (-(2**63), 2**63 - 1, numpy.int64(-1), torch.tensor(2**63 - 1)):
        steering = FKSteering(seed=seed)
        for _ in range(3):
            steering.step(rewards)


def test_rewards_that_require_grad_keep_no_graph():
    steering = FKSteering(lmbda=2.0, seed=0)
    for _ in range(2):
        result = steering.step(torch.randn(2, 4, requires_grad=True) * 1.0)
        tensors = (*result, steering.log_weights, steering.weights, steering.log_z, steering.reward)
        assert not any(tensor.requires_grad for tensor in tensors)


def test_no_particles():
    steering = FKSteering(seed=0)
    result = steering.step(torch.zeros(2, 0))
    assert result.ancestors.shape == (2, 0)
    assert torch.equal(steering.log_z, torch.tensor([-INF, -INF]))


def test_broken_constraints():
    """A reward of -inf ends a particle, even where its next reward is finite."""
    for kind in KINDS:
        steering = FKSteering(kind, 1.0, ess_threshold=1e-9)
        steering.step(torch.tensor([0.0, -INF, 1.0, float("nan")]))
        steering.step(torch.tensor([0.5, 2.0, 1.0, 2.0]), terminal=True)
        torch.testing.assert_close(
            steering.weights, torch.tensor([0.5, -INF, 1.0, -INF]).softmax(-1)
        )
    # Also one that breaks later, and one that nothing but the constraint steers.
    for kind in KINDS:
        for lmbda in (0.0, 1.0):
            state, total = None, torch.zeros(3)
            for step, reward in enumerate(([1.0, 2.0, 3.0], [0.0, -INF, float("nan")], [1.0] * 3)):
                log_potential, state = fk_potential(
                    torch.tensor(reward), state, kind=kind, lmbda=lmbda, terminal=step == 2
                )
                total += log_potential
                assert step == 0 or torch.equal(total == -INF, torch.tensor([False, True, True]))
                torch.testing.assert_close(state.log_product, total)
            assert total[0] == lmbda
    dead = FKSteering("sum", seed=0)
    result = dead.step(torch.full((2, 3), -INF))
    assert torch.equal(result.ancestors, torch.arange(3).expand(2, 3))
    assert (dead.weights == 0).all()
    assert (dead.log_z == -INF).all()


def test_final_selection():
    steering = FKSteering("sum", 1.0, ess_threshold=1e-9)
    reward = torch.tensor([[0.1, 0.9, 0.5], [float("nan"), -INF, -2.0]])
    steering.step(reward, terminal=True)
    assert torch.equal(steering.best(), torch.tensor([1, 2]))
    tree = {"x": torch.arange(12).view(2, 3, 2), "y": torch.arange(6).view(2, 3)}
    chosen = steering.select(tree)
    assert torch.equal(chosen["x"], torch.tensor([[2, 3], [10, 11]]))
    assert torch.equal(chosen["y"], torch.tensor([1, 5]))
    single = FKSteering(seed=0)
    single.step(torch.tensor([0.0, 1.0]))
    assert single.select(torch.tensor([5.0, 6.0])).shape == ()


def test_errors():
    with pytest.raises(ValueError, match="kind: expected one of difference, max, sum, got 'mean'"):
        FKSteering("mean")
    with pytest.raises(ValueError, match="kind: .*got 'mean'"):
        fk_potential(torch.zeros(2), None, kind="mean", lmbda=1.0)
    for lmbda in (-1.0, INF, float("nan")):
        with pytest.raises(ValueError, match="lmbda: expected a finite number of at least 0"):
            FKSteering(lmbda=lmbda)
        with pytest.raises(ValueError, match="lmbda: .*negate the reward"):
            fk_potential(torch.zeros(2), None, kind="sum", lmbda=lmbda)
    for options, message in (
        ({"lmbda": "1"}, "lmbda: expected a finite number .*got '1'"),
        ({"lmbda": None}, "lmbda: expected a finite number .*got None"),
        ({"scheme": "sytematic"}, "scheme: expected one of systematic, .*, got 'sytematic'"),
        ({"ess_threshold": 0.0}, r"ess_threshold: expected a share in \(0, 1\] or None, got 0.0"),
        ({"ess_threshold": 1.5}, "ess_threshold: .*got 1.5"),
        ({"ess_threshold": "0.5"}, "ess_threshold: .*got '0.5'"),
        ({"ess_threshold": float("nan")}, "ess_threshold: .*got nan"),
        ({"seed": 1.0}, "seed: expected an int or a 0-dim int64 tensor, got float"),
        ({"seed": torch.zeros(2).long()}, r"seed: .*got torch.int64 of shape \(2,\)"),
        ({"seed": torch.tensor(1.0)}, r"seed: .*got torch.float32"),
        ({"seed": 2**63}, "seed: expected a number of 64 bits"),
        ({"seed": 1, "generator": torch.Generator()}, "seed: .*got both"),
    ):
        with pytest.raises(ValueError, match=message):
            FKSteering(**options)
    for reward in ([1.0, 2.0], numpy.ones(2), None):
        with pytest.raises(ValueError, match="reward: expected a floating tensor .*, got "):
            FKSteering().step(reward)
        with pytest.raises(ValueError, match="reward: expected a floating tensor .*, got "):
            fk_potential(reward, None, kind="sum", lmbda=1.0)
    with pytest.raises(ValueError, match="state: expected a PotentialState or None, got tuple"):
        fk_potential(torch.zeros(2), (torch.zeros(2), torch.zeros(2)), kind="sum", lmbda=1.0)
    with pytest.raises(ValueError, match=r"reward: expected \(\.\.\., K\), got a scalar"):
        FKSteering().step(torch.tensor(1.0))
    with pytest.raises(ValueError, match="reward: expected a floating tensor, got torch.int64"):
        FKSteering().step(torch.zeros(2, dtype=torch.int64))
    steering = FKSteering()
    steering.step(torch.zeros(3))
    with pytest.raises(ValueError, match=r"reward: expected the shape of the state \(3,\), got"):
        steering.step(torch.zeros(4))
    steering.step(torch.zeros(3), terminal=True)
    with pytest.raises(ValueError, match=r"reset\(\) begins a new one"):
        steering.step(torch.zeros(3))
