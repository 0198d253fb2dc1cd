"""resample against its definition and its contracts."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torch_winnow import reference
from torch_winnow._resampling.resample import SCHEMES
from torch_winnow.resampling import Status, resample

INF = float("inf")
NAN = float("nan")
ANY_NUMBER = tuple(scheme for scheme in SCHEMES if scheme != "killing")  # of samples


def assert_same(result, expected):
    """Decisions bitwise; statistics to the rounding of float32."""
    for name in ("ancestors", "offspring", "resampled", "status"):
        assert torch.equal(getattr(result, name), getattr(expected, name)), name
    for name in ("log_weights", "log_z", "ess"):
        torch.testing.assert_close(
            getattr(result, name), getattr(expected, name), rtol=2e-5, atol=2e-6, msg=name
        )


SHAPES = [(1,), (15,), (3, 16), (2, 2, 17), (2, 130), (700,), (0, 4), (2, 0)]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("keep_slots", [False, True])
def test_matches_definition(scheme, keep_slots, dtype, device):
    for shape in SHAPES:
        log_weights = (3 * torch.randn(shape)).to(device, dtype)
        options = {"scheme": scheme, "keep_slots": keep_slots, "seed": 11}
        result = resample(log_weights, **options)
        assert result.log_weights.dtype == result.log_z.dtype == result.ess.dtype == torch.float32
        assert_same(result, reference.resample(log_weights.float(), **options))


@pytest.mark.parametrize("scheme", ANY_NUMBER)
@pytest.mark.parametrize("samples", [0, 1, 5, 300])
def test_float64_and_other_sample_counts(scheme, samples, cpu_capability):
    log_weights = 5 * torch.randn(3, 40, dtype=torch.float64)
    result = resample(log_weights, scheme=scheme, num_samples=samples, seed=2)
    expected = reference.resample(log_weights, scheme=scheme, num_samples=samples, seed=2)
    assert_same(result, expected)
    torch.testing.assert_close(result.log_z, expected.log_z, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(result.ess, expected.ess, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("scheme", ["ssp", "killing", "optimal"])
def test_more_particles_than_a_run_of_runs(scheme):
    """ssp pairs 64 particles, then 64 such runs, then those."""
    log_weights = torch.randn(4200, dtype=torch.float64)
    options = {"scheme": scheme, "num_samples": 2000 if scheme == "optimal" else None, "seed": 2}
    assert_same(resample(log_weights, **options), reference.resample(log_weights, **options))


@pytest.mark.parametrize("scheme", ["systematic", "stratified", "multinomial"])
@pytest.mark.parametrize("real", [torch.float32, torch.float64])
def test_given_uniforms(scheme, real):
    log_weights = torch.randn(4, 3, 20)
    shape = (4, 3) if scheme == "systematic" else (4, 3, 7)
    uniforms = torch.rand(shape, dtype=real)
    options = {"scheme": scheme, "num_samples": 7, "uniforms": uniforms}
    assert_same(resample(log_weights, **options), reference.resample(log_weights, **options))
    strided = {**options, "uniforms": torch.rand(*shape, 2, dtype=real)[..., 0].copy_(uniforms)}
    assert_same(resample(log_weights, **strided), resample(log_weights, **options))


def test_uniforms_outside_the_interval_are_clamped():
    log_weights = torch.tensor([-INF, 0.0, 0.0, -INF])
    for u in (0.0, 1.0 - 2**-53, 1.0, 2.0, -1.0, NAN):
        for scheme in ("systematic", "stratified", "multinomial"):
            shape = () if scheme == "systematic" else (4,)
            uniforms = torch.full(shape, u, dtype=torch.float64)
            ancestors = resample(log_weights, scheme=scheme, uniforms=uniforms).ancestors
            assert ((ancestors == 1) | (ancestors == 2)).all()


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("threshold", [0.05, 0.5, 1.0])
def test_threshold_and_mask_match_definition(scheme, threshold):
    scale = torch.linspace(0, 6, 40).unsqueeze(-1)
    log_weights = scale * torch.randn(40, 33)
    options = {"scheme": scheme, "ess_threshold": threshold, "seed": 5}
    result = resample(log_weights, **options)
    assert_same(result, reference.resample(log_weights, **options))
    if threshold < 1:
        assert 0 < result.resampled.sum() < 40
    # Where nothing happens, everything is carried.
    still = ~result.resampled
    assert torch.equal(result.ancestors[still], torch.arange(33).expand(int(still.sum()), 33))
    assert torch.equal(result.log_weights[still], log_weights[still])
    assert (result.log_z[still] == 0).all()
    if scheme != "optimal":
        assert (result.log_weights[result.resampled] == 0).all()
    mask = torch.rand(40, 33) < torch.linspace(0, 1, 40).unsqueeze(-1)
    for keep_slots in (False, True):
        masked = resample(log_weights, mask=mask, keep_slots=keep_slots, **options)
        assert_same(
            masked, reference.resample(log_weights, mask=mask, keep_slots=keep_slots, **options)
        )
        # Finished particles are neither copied nor overwritten.
        assert torch.equal(masked.ancestors[~mask], torch.arange(33).expand(40, 33)[~mask])
        assert (masked.offspring[~mask] == 1).all()


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("wide", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("weights", "status"),
    [
        ([0.0, 0.0, 0.0], Status.OK),
        ([1e30, 1e30, -1e30], Status.OK),
        ([-3e38, -INF, -3e38], Status.OK),
        ([-INF, -INF], Status.NO_WEIGHT),
        ([NAN, NAN], Status.NO_WEIGHT | Status.NAN),
        ([NAN, -INF, 1.0], Status.NAN),
        ([INF, 5.0, INF, NAN], Status.INFINITE | Status.NAN),
        ([], Status.NOTHING_LIVE),
    ],
)
def test_edges(weights, status, wide, scheme, cpu_capability):
    log_weights = torch.tensor(weights, dtype=wide)
    result = resample(log_weights, scheme=scheme, seed=0)
    assert_same(result, reference.resample(log_weights, scheme=scheme, seed=0))
    assert result.status == status
    dead = bool(status & (Status.NO_WEIGHT | Status.NOTHING_LIVE))
    assert result.resampled == (not dead)
    if dead:
        assert torch.equal(result.ancestors, torch.arange(len(weights)))
        assert (result.log_weights == -INF).all()
        assert result.log_z == 0


def test_population_without_weight_and_other_sample_count():
    result = resample(torch.full((2, 3), -INF), num_samples=7)
    assert torch.equal(result.ancestors[1], torch.tensor([0, 1, 2, 0, 1, 2, 0]))
    assert torch.equal(result.offspring[1], torch.tensor([3, 2, 2]))
    assert (result.log_weights == -INF).all()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_mask_edges(scheme):
    log_weights = torch.tensor([[0.0, INF, NAN, -1.0], [NAN, INF, 2.0, -INF]])
    nothing = resample(log_weights, scheme=scheme, mask=torch.zeros(2, 4, dtype=torch.bool))
    assert (nothing.status == Status.NOTHING_LIVE).all()
    assert not nothing.resampled.any()
    assert torch.equal(nothing.ancestors, torch.arange(4).expand(2, 4))
    assert torch.equal(nothing.log_weights, log_weights.nan_to_num(-INF, INF, -INF))
    mask = torch.tensor([[True, False, False, True], [False, True, True, False]])
    options = {"scheme": scheme, "mask": mask, "seed": 3}
    assert_same(resample(log_weights, **options), reference.resample(log_weights, **options))
    everything = {"scheme": scheme, "mask": torch.ones(2, 4, dtype=torch.bool), "seed": 3}
    assert_same(resample(log_weights, **everything), resample(log_weights, scheme=scheme, seed=3))


def exact_counts(log_weights, samples):
    """Cumulative shares times M, as exact as float64 gets."""
    return samples * log_weights.double().softmax(-1).cumsum(-1)


@pytest.mark.parametrize("spread", [0.0, 1.0, 30.0])
def test_systematic_cumulative_offspring(spread, cpu_capability):
    for particles, seed in itertools.product((1, 2, 3, 64, 1000, 8192, 8193, 20_000), range(3)):
        log_weights = spread * torch.randn(2, particles, dtype=torch.float64)
        for samples in (1, particles, 3 * particles + 1):
            result = resample(log_weights, num_samples=samples, seed=seed)
            error = result.offspring.cumsum(-1) - exact_counts(log_weights, samples)
            assert error.abs().max() < 1 + 1e-9
            assert (result.offspring.sum(-1) == samples).all()


def test_equal_weights_are_decided_exactly():
    """Every cumulative share is a tie of the grid: rounding must not move one particle."""
    for particles in (3, 7, 64, 100, 4096, 9001):
        for scheme in ("systematic", "stratified", "residual"):
            result = resample(torch.full((4, particles), -7.25), scheme=scheme, seed=1)
            assert (result.offspring == 1).all()
            assert torch.equal(result.ancestors, torch.arange(particles).expand(4, particles))
        zero = torch.zeros(4, dtype=torch.float64)
        assert (resample(torch.zeros(4, particles), uniforms=zero).offspring == 1).all()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_million_particles(scheme):
    """Rivals return index K here: a float32 prefix sum ends below one."""
    particles = 1_000_000
    for seed in range(3):
        log_weights = torch.randn(particles)
        log_weights[-5:] = -INF
        log_weights[::7] = -INF
        result = resample(log_weights, scheme=scheme, seed=seed)
        assert int(result.offspring.sum()) == particles
        assert 0 <= int(result.ancestors.min()) <= int(result.ancestors.max()) < particles - 5
        assert (result.offspring[log_weights == -INF] == 0).all()
        assert torch.equal(torch.bincount(result.ancestors, minlength=particles), result.offspring)
        if scheme == "systematic":
            error = result.offspring.cumsum(-1) - exact_counts(log_weights, particles)
            assert error.abs().max() < 1 + 1e-3  # of the float32 weights: 1e6 * 2^-24 and less


@pytest.mark.parametrize("scheme", ANY_NUMBER)
def test_upper_half_of_many_categories(scheme):
    """torch.multinomial with 2^24 categories never picks the upper half."""
    result = resample(torch.zeros(2**24 + 1), scheme=scheme, num_samples=1000, seed=0)
    upper = int((result.ancestors > 2**23).sum())
    assert 400 < upper < 600


@pytest.mark.parametrize(
    ("scheme", "samples"),
    [*itertools.product(ANY_NUMBER, (4, 6, 9)), ("killing", 6)],
)
def test_unbiased(scheme, samples):
    """E[offspring] = M W, each copy counted by its weight. Six means of 20000 populations each;
    5 sigma: an error rate below 1e-5."""
    log_weights = torch.tensor([0.3, -1.0, 2.0, -INF, 1.0, -3.0])
    populations = 20_000
    result = resample(
        log_weights.expand(populations, 6), scheme=scheme, num_samples=samples, seed=17
    )
    assert (result.offspring[:, 3] == 0).all()
    offspring = torch.zeros(populations, 6, dtype=torch.float64)
    offspring.scatter_add_(1, result.ancestors, result.log_weights.double().exp())
    expected = samples * log_weights.double().softmax(-1)
    error = offspring.mean(0) - expected
    sigma = offspring.std(0) / populations**0.5
    assert (error.abs() <= 5 * sigma + 1e-6).all(), error / sigma
    # No scheme is noisier than independent draws.
    share = expected / samples
    assert (offspring.var(0) <= 1.1 * samples * share * (1 - share)).all()


def test_multinomial_slots_are_independent():
    """Each slot alone follows the weights, whatever the others hold; 5 sigma."""
    share = torch.tensor([0.5, 0.3, 0.2])
    result = resample(share.log().expand(20_000, 3), scheme="multinomial", seed=4)
    for slot in range(3):
        counts = torch.bincount(result.ancestors[:, slot], minlength=3).double() / 20_000
        assert ((counts - share).abs() < 5 * (share * (1 - share) / 20_000).sqrt()).all()
    both = (result.ancestors[:, 0] == 0) & (result.ancestors[:, 1] == 0)
    assert abs(both.double().mean() - 0.25) < 5 * (0.25 * 0.75 / 20_000) ** 0.5


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("shape", [(40, 5), (6, 300), (3, 20_000)])
def test_populations_do_not_see_each_other(scheme, shape):
    log_weights = 2 * torch.randn(shape)
    result = resample(log_weights, scheme=scheme, seed=9)
    part = resample(log_weights[:2], scheme=scheme, seed=9)
    assert all(torch.equal(p, r[:2]) for p, r in zip(part, result, strict=True))
    other = log_weights.clone()
    other[1] = NAN
    changed = resample(other, scheme=scheme, seed=9)
    assert torch.equal(changed.ancestors[2:], result.ancestors[2:])
    folded = resample(log_weights.reshape(1, *shape), scheme=scheme, seed=9)
    assert torch.equal(folded.ancestors[0], result.ancestors)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("shape", [(300, 3), (50, 64), (2, 30_000), (1, 100_000)])
def test_bitwise_equal_everywhere(scheme, shape, on_every_capability, on_thread_counts):
    for dtype, keep_slots in itertools.product((torch.float32, torch.float64), (False, True)):
        log_weights = 2 * torch.randn(shape, dtype=dtype)

        def call(log_weights=log_weights, keep_slots=keep_slots):
            return resample(
                log_weights, scheme=scheme, keep_slots=keep_slots, ess_threshold=0.9, seed=1
            )

        results = on_every_capability(call) + on_thread_counts(call)
        for result in results:
            assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_survivors_keep_their_slot(scheme):
    log_weights = 2 * torch.randn(20, 500)
    plain = resample(log_weights, scheme=scheme, seed=6)
    kept = resample(log_weights, scheme=scheme, seed=6, keep_slots=True)
    assert torch.equal(plain.offspring, kept.offspring)
    survives = kept.offspring > 0
    assert torch.equal(kept.ancestors == torch.arange(500), survives)
    counts = torch.stack([torch.bincount(row, minlength=500) for row in kept.ancestors])
    assert torch.equal(counts, kept.offspring)


extremes = st.sampled_from([0.0, -INF, INF, NAN, 3e38, -3e38, -87.4, -40.0, 1e-30, -1e-7, 88.0])
log_weight = st.one_of(extremes, st.floats(-50, 50, width=32), st.floats(width=32))


@settings(max_examples=400, deadline=None)
@given(
    weights=st.lists(log_weight, max_size=40),
    scheme=st.sampled_from(SCHEMES),
    samples=st.one_of(st.none(), st.integers(0, 100)),
    seed=st.integers(0, 2**63 - 1),
)
def test_contracts_for_any_weights(weights, scheme, samples, seed):
    log_weights = torch.tensor(weights)
    if not weights or samples is None or scheme == "killing":
        samples = len(weights)
    keep_slots = samples == len(weights)
    result = resample(
        log_weights, scheme=scheme, num_samples=samples, keep_slots=keep_slots, seed=seed
    )
    assert int(result.offspring.sum()) == samples
    assert torch.equal(torch.bincount(result.ancestors, minlength=len(weights)), result.offspring)
    if result.resampled:
        share = reference.resampling.normalised(log_weights)
        assert (result.offspring[share == 0] == 0).all()
        if scheme == "systematic":
            error = result.offspring.cumsum(0) - samples * share.cumsum(0)
            assert error.abs().max() < 1 + 1e-4  # of the float32 weights
        if scheme in ("residual", "ssp"):
            assert (result.offspring >= (samples * share - 1e-4).floor()).all()
        if scheme == "ssp":
            assert (result.offspring <= (samples * share + 1e-4).ceil()).all()
        if scheme == "optimal" and samples > 0:
            assert result.log_weights.double().exp().mean() == pytest.approx(1, rel=1e-4)
            positive = int((share > 2**-59).sum())
            assert samples > positive or (result.offspring <= 1).all()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_small_populations_as_large_ones(scheme):
    """Populations of at most 16 are done sixteen at a time; a mask that is true takes the other
    path, and uniforms too. Decisions and statistics are bitwise the same."""
    for particles, rows in itertools.product(range(1, 18), (1, 15, 16, 17, 50)):
        log_weights = 3 * torch.randn(rows, particles)
        log_weights[torch.rand(rows, particles) < 0.1] = -INF
        log_weights[rows // 2] = NAN
        log_weights[rows // 3, 0] = INF
        mask = torch.ones(rows, particles, dtype=torch.bool)
        for threshold, keep_slots in itertools.product((None, 0.5), (False, True)):
            options = {"ess_threshold": threshold, "keep_slots": keep_slots, "seed": particles}
            options["scheme"] = scheme
            small = resample(log_weights, **options)
            large = resample(log_weights, mask=mask, **options)
            assert all(torch.equal(a, b) for a, b in zip(small, large, strict=True))
            apart = resample(log_weights.T.contiguous().T, **options)
            assert all(torch.equal(a, b) for a, b in zip(small, apart, strict=True))
            padded = torch.nn.functional.pad(log_weights, (2, 3))[:, 2:-3]
            apart = resample(padded, **options)
            assert all(torch.equal(a, b) for a, b in zip(small, apart, strict=True))


def test_strided_input_needs_no_copy():
    log_weights = torch.randn(6, 50)[::2, 3:40]
    mask = (torch.rand(6, 50) < 0.5)[::2, 3:40]
    expected = resample(log_weights.contiguous(), mask=mask.contiguous(), seed=0)
    assert_same(resample(log_weights, mask=mask, seed=0), expected)
    transposed = torch.randn(40, 6).T
    assert_same(resample(transposed, seed=0), resample(transposed.clone(), seed=0))


def test_seeds():
    log_weights = torch.randn(5, 100)
    result = resample(log_weights, seed=7)
    assert torch.equal(resample(log_weights, seed=torch.tensor(7)).ancestors, result.ancestors)
    assert not torch.equal(resample(log_weights, seed=8).ancestors, result.ancestors)
    generator = torch.Generator().manual_seed(3)
    first = resample(log_weights, generator=generator).ancestors
    second = resample(log_weights, generator=generator).ancestors
    assert not torch.equal(first, second)
    generator.manual_seed(3)
    assert torch.equal(resample(log_weights, generator=generator).ancestors, first)
    torch.manual_seed(3)
    default = resample(log_weights).ancestors
    torch.manual_seed(3)
    assert torch.equal(resample(log_weights).ancestors, default)
    with_state = torch.get_rng_state()
    resample(log_weights, seed=1)
    assert torch.equal(torch.get_rng_state(), with_state)


def test_opcheck_and_compile():
    log_weights = torch.randn(3, 20)
    arguments = (log_weights, "systematic", 7, None, False, None, torch.rand(3), None, 0, None)
    torch.library.opcheck(torch.ops.winnow.resample.default, arguments)
    masked = (log_weights.double(), "residual", None, 0.5, True, log_weights > 0, None)
    pinned = torch.tensor([0, 3, 19])
    torch.library.opcheck(torch.ops.winnow.resample.default, (*masked, pinned, 0, torch.tensor(3)))

    @torch.compile(fullgraph=True)
    def compiled(log_weights, seed):
        return resample(log_weights, scheme="stratified", ess_threshold=0.5, seed=seed)

    for seed in (3, torch.tensor(3)):
        expected = resample(log_weights, scheme="stratified", ess_threshold=0.5, seed=3)
        assert_same(compiled(log_weights, seed), expected)
    drawn = torch.compile(resample, fullgraph=True)(log_weights)
    assert (drawn.offspring.sum(-1) == 20).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"log_weights": torch.ones(3).long()}, r"log_weights: expected float32.*int64"),
        ({"log_weights": torch.tensor(1.0)}, r"log_weights: expected \(\.\.\., K\), got a scalar"),
        ({"scheme": "best"}, "scheme: expected systematic.*got 'best'"),
        ({"scheme": "killing", "num_samples": 2}, "num_samples: expected K = 5 with scheme='kill"),
        ({"num_samples": -1}, "num_samples: expected 0 to 2.40, got -1"),
        ({"log_weights": torch.ones(2, 0), "num_samples": 2}, "num_samples: expected 0.*got 2"),
        ({"ess_threshold": 0.0}, r"ess_threshold: expected a share in \(0, 1\], got 0"),
        ({"ess_threshold": 1.5}, "ess_threshold: .*got 1.5"),
        ({"ess_threshold": NAN}, "ess_threshold: .*got nan"),
        ({"ess_threshold": 0.5, "num_samples": 2}, "num_samples: expected K = 5.*got 2"),
        ({"keep_slots": True, "num_samples": 2}, "num_samples: expected K = 5 with keep_slots"),
        ({"mask": torch.ones(5)}, "mask: expected bool, got float32"),
        ({"mask": torch.ones(4, dtype=torch.bool)}, r"mask: expected the shape.*got \(4,\)"),
        (
            {"mask": torch.ones(3, 5, dtype=torch.bool), "num_samples": 2},
            "num_samples: expected K = 5 with mask",
        ),
        ({"uniforms": torch.rand(3, 5)}, r"uniforms: expected \(\.\.\.\).*got shape \(3, 5\)"),
        ({"scheme": "stratified", "uniforms": torch.rand(3)}, r"uniforms: expected \(\.\.\., M\)"),
        ({"scheme": "residual", "uniforms": torch.rand(3)}, "uniforms: accepted for.*'residual'"),
        ({"uniforms": torch.ones(3, dtype=torch.int64)}, "uniforms: expected float32 or float64"),
        ({"seed": torch.tensor([1])}, r"seed: expected an int or a 0-dim .* of shape \(1,\)"),
        ({"seed": torch.tensor(1.0)}, "seed: expected an int or a 0-dim int64 .*got torch.float32"),
    ],
)
def test_errors_name_the_argument(options, message):
    options = {"log_weights": torch.zeros(3, 5), **options}
    with pytest.raises(ValueError, match=message):
        resample(options.pop("log_weights"), **options)
