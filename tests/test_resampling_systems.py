"""Small systems built from the operators, each against an exact answer, with a fixed seed.

Tolerances are 4.5 standard errors of independent repetitions unless a test says otherwise: a right
program fails one such check in 150 000 seeds.
"""

from __future__ import annotations

import itertools
import math

import torch

from torch_winnow.resampling import (
    conditional_effective_sample_size,
    gather_particles,
    log_mean_exp,
    next_temperature,
    normalised_weights,
    resample,
)

STATES, STEPS = 4, 8


def assert_mean(samples: torch.Tensor, exact: float) -> None:
    error = samples.std() / len(samples) ** 0.5
    assert (samples.mean() - exact).abs() < 4.5 * error + 1e-12, (samples.mean(), exact, error)


def hidden_markov_model() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Start, transition matrix and likelihoods p(y_t | x), all as probabilities."""
    generator = torch.Generator().manual_seed(0)
    start = torch.full((STATES,), 1 / STATES, dtype=torch.float64)
    move = torch.rand(STATES, STATES, generator=generator).double() ** 2 + 0.05
    seen = torch.rand(STEPS, STATES, generator=generator).double() ** 3 + 0.01
    return start, move / move.sum(-1, keepdim=True), seen


def backward_messages(move: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """p(y_{t+1:T} | x_t): the exact twist of step t."""
    messages = [torch.ones(STATES, dtype=torch.float64)]
    for t in range(STEPS - 1, 0, -1):
        messages.append(move @ (seen[t] * messages[-1]))
    return torch.stack(messages[::-1])


def draw(probabilities: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    u = torch.rand(probabilities.shape[:-1], generator=generator, dtype=torch.float64)
    cumulative = probabilities.cumsum(-1) / probabilities.sum(-1, keepdim=True)
    return (cumulative < u.unsqueeze(-1)).sum(-1).clamp(max=STATES - 1)


def filter_with_twist(twist: torch.Tensor, runs: int, particles: int, pinned=None):
    """Log Z estimates of many filters that look ahead by ``twist`` (T, states).

    The proposal is the transition tilted by likelihood and twist. With ``pinned`` (T,), the path of
    particle 0 is given: conditional SMC, whose estimate bounds log Z from above.
    """
    start, move, seen = hidden_markov_model()
    generator = torch.Generator().manual_seed(1)
    log_z = torch.zeros(runs, dtype=torch.float64)
    weights = torch.zeros(runs, particles, dtype=torch.float64)
    x = None
    for t in range(STEPS):
        if t > 0:
            result = resample(
                weights, ess_threshold=0.7, seed=t, pinned=None if pinned is None else 0
            )
            log_z += result.log_z
            weights, x = result.log_weights, gather_particles(x, result.ancestors)
        prior = start.expand(runs, particles, -1) if t == 0 else move[x]
        tilted = prior * seen[t] * twist[t]
        before = 0.0 if t == 0 else twist[t - 1].log()[x]
        x = draw(tilted, generator)
        if pinned is not None:
            x[:, 0] = pinned[:, t]
        weights = weights + tilted.sum(-1).log() - before
    return log_z + log_mean_exp(weights)


def exact_log_z() -> float:
    start, move, seen = hidden_markov_model()
    forward = start * seen[0]
    for t in range(1, STEPS):
        forward = (forward @ move) * seen[t]
    return float(forward.sum().log())


def exact_paths(runs: int) -> torch.Tensor:
    """Draws from the posterior of paths, by forward sampling with the backward messages."""
    start, move, seen = hidden_markov_model()
    messages = backward_messages(move, seen)
    generator = torch.Generator().manual_seed(2)
    path = [draw((start * seen[0] * messages[0]).expand(runs, -1), generator)]
    for t in range(1, STEPS):
        path.append(draw(move[path[-1]] * seen[t] * messages[t], generator))
    return torch.stack(path, -1)


def test_exact_twists_have_no_noise():
    _, move, seen = hidden_markov_model()
    estimates = filter_with_twist(backward_messages(move, seen), runs=5, particles=4)
    torch.testing.assert_close(estimates, torch.full((5,), exact_log_z(), dtype=torch.float64))


def test_twisted_filters_bound_log_z_from_both_sides():
    """Z is unbiased, so E log Z is a lower bound; from a posterior path it is an upper one."""
    _, move, seen = hidden_markov_model()
    messages = backward_messages(move, seen)
    exact, gaps = exact_log_z(), []
    for sharpness in (0.0, 0.7):  # no twist, and one that is nearly right
        twist = messages**sharpness
        twist[-1] = 1.0
        below = filter_with_twist(twist, runs=4000, particles=6)
        above = filter_with_twist(twist, runs=4000, particles=6, pinned=exact_paths(4000))
        assert_mean((below - exact).exp(), 1.0)  # unbiased
        assert_mean((exact - above).exp(), 1.0)  # and so is its inverse under conditional SMC
        assert below.mean() < exact < above.mean()
        gaps.append(float(above.mean() - below.mean()))
    assert gaps[1] < 0.3 * gaps[0]


def test_partial_solutions_that_finish_keep_their_weight():
    """Random strings end at symbol 0; a reward for each symbol tilts them.

    Against the sum over every string. Finished particles sit out later resamples behind a mask.
    """
    p_end, length = 0.3, 6
    bonus = torch.tensor([0.0, 1.5, -1.0], dtype=torch.float64)  # of the end, of a, of b
    law = torch.tensor([p_end, 0.4, 0.3], dtype=torch.float64)
    z, mean_length = 0.0, 0.0
    for n in range(length + 1):
        for word in itertools.product((1, 2), repeat=n):
            weight = math.prod(law[s].item() * math.exp(bonus[s].item()) for s in word)
            weight *= 1.0 if n == length else p_end
            z, mean_length = z + weight, mean_length + n * weight
    mean_length /= z

    runs, particles = 6000, 12
    generator = torch.Generator().manual_seed(3)
    weights = torch.zeros(runs, particles, dtype=torch.float64)
    log_z = torch.zeros(runs, dtype=torch.float64)
    state = {
        "length": torch.zeros(runs, particles),
        "live": torch.ones(runs, particles, dtype=torch.bool),
    }
    for t in range(length):
        if t > 0:
            result = resample(weights, mask=state["live"], ess_threshold=0.6, seed=t)
            before = state["length"][~state["live"]]
            state = gather_particles(state, result.ancestors)
            assert torch.equal(state["length"][~state["live"]], before)
            log_z, weights = log_z + result.log_z, result.log_weights
        symbol = draw_symbol(law, (runs, particles), generator)
        live = state["live"]
        weights = weights + torch.where(live, bonus[symbol], 0.0)
        state["length"] = state["length"] + (live & (symbol > 0))
        state["live"] = live & (symbol > 0)
    estimates = (log_z + log_mean_exp(weights)).exp()
    assert_mean(estimates / z, 1.0)
    shares = normalised_weights(weights)
    lengths = (shares * state["length"]).sum(-1)
    assert_mean(estimates / z * lengths, mean_length)  # the properly weighted mean


def draw_symbol(law: torch.Tensor, shape: tuple[int, int], generator: torch.Generator):
    u = torch.rand(shape, generator=generator, dtype=torch.float64)
    return (law.cumsum(0)[:-1] < u.unsqueeze(-1)).sum(-1)


def test_tempered_sampler_of_a_gaussian_mixture():
    """Log Z of a two-dimensional mixture over a wide normal start, which is known exactly.

    The schedule is each population's own; Metropolis steps move between two temperatures. The
    schedule that adapts to the particles makes Z slightly biased, hence 0.01 beside the noise.
    """
    runs, particles, sd = 200, 256, 6.0
    generator = torch.Generator().manual_seed(5)
    centres = torch.tensor([[-4.0, 0.0], [4.0, 1.0], [0.0, -5.0]], dtype=torch.float64)
    masses = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)

    def log_prior(x):
        return -0.5 * (x / sd).square().sum(-1) - math.log(2 * math.pi * sd * sd)

    def log_target(x):
        squares = (x.unsqueeze(-2) - centres).square().sum(-1)
        return (masses.log() - 0.5 * squares / 0.25).logsumexp(-1)

    exact = math.log(float(masses.sum()) * 2 * math.pi * 0.25)
    normal = {"generator": generator, "dtype": torch.float64}
    x = sd * torch.randn(runs, particles, 2, **normal)
    beta = torch.zeros(runs, dtype=torch.float64)
    log_z = torch.zeros(runs, dtype=torch.float64)
    steps = 0
    while (beta < 1).any():
        ratio = log_target(x) - log_prior(x)
        after = next_temperature(ratio, beta, 0.7)
        increments = (after - beta).unsqueeze(-1) * ratio
        left = conditional_effective_sample_size(torch.zeros_like(increments), increments)
        short = (after < 1) & (beta < 1)
        assert ((left[short] - 0.7 * particles).abs() < 1e-3 * particles).all()
        result = resample(increments, seed=steps)
        log_z += result.log_z
        x, beta, steps = gather_particles(x, result.ancestors), after, steps + 1
        assert steps < 60

        def log_density(x, beta=beta):
            b = beta.unsqueeze(-1)
            return (1 - b) * log_prior(x) + b * log_target(x)

        for scale in (2.0, 1.0, 0.4, 0.4):
            proposal = x + scale * torch.randn(x.shape, **normal)
            u = torch.rand(x.shape[:-1], **normal)
            accept = u.log() < log_density(proposal) - log_density(x)
            x = torch.where(accept.unsqueeze(-1), proposal, x)
    assert (beta == 1).all()
    ratios = (log_z - exact).exp()
    assert abs(ratios.mean() - 1) < 4.5 * ratios.std() / runs**0.5 + 0.01
    assert ratios.std() < 0.3
    torch.testing.assert_close(x.mean((0, 1)), (masses @ centres) / masses.sum(), rtol=0, atol=0.1)


def test_two_populations_merge():
    """Divide and conquer (Lindsten et al. 2017): two chains' halves, joined by a factor.

    Every pair of a left and a right particle is weighed by the factor between them, and as many
    pairs drawn as there were particles. Z and the mean of a product against the sum over states.
    """
    runs, particles = 3000, 10
    generator = torch.Generator().manual_seed(6)
    left_law = torch.tensor([0.2, 0.5, 0.3, 0.0], dtype=torch.float64)
    right_law = torch.tensor([0.4, 0.1, 0.1, 0.4], dtype=torch.float64)
    left_factor = torch.tensor([2.0, 0.3, 1.0, 1.0], dtype=torch.float64).log()
    right_factor = torch.tensor([0.5, 3.0, 1.0, 0.2], dtype=torch.float64).log()
    joint = 3 * torch.rand(STATES, STATES, generator=generator, dtype=torch.float64) - 1
    f = torch.randn(STATES, STATES, generator=generator, dtype=torch.float64)
    table = (left_law.log() + left_factor).unsqueeze(-1) + right_law.log() + right_factor + joint
    z = float(table.exp().sum())
    mean = float((table.exp() * f).sum()) / z

    a = draw(left_law.expand(runs, particles, -1), generator)
    b = draw(right_law.expand(runs, particles, -1), generator)
    halves = [
        resample(left_factor[a], ess_threshold=0.8, seed=1),
        resample(right_factor[b], ess_threshold=0.8, seed=2),
    ]
    a, b = (gather_particles(x, h.ancestors) for x, h in zip((a, b), halves, strict=True))
    w, v = (h.log_weights for h in halves)
    pairs = w.unsqueeze(-1) + v.unsqueeze(-2) + joint[a.unsqueeze(-1), b.unsqueeze(-2)]
    merged = resample(pairs.flatten(-2), num_samples=particles, seed=3)
    log_z = halves[0].log_z + halves[1].log_z + merged.log_z
    pair = merged.ancestors
    a = a.gather(-1, pair // particles)
    b = b.gather(-1, pair % particles)
    assert_mean(log_z.exp() / z, 1.0)
    assert_mean((log_z.exp().unsqueeze(-1) / z * f[a, b]).mean(-1), mean)
