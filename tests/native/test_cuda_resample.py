"""resample on the GPU: bit for bit what the CPU decides."""

from __future__ import annotations

import itertools

import host_library
import pytest
import torch

import torch_winnow
from torch_winnow._resampling.resample import SCHEMES
from torch_winnow.resampling import Status, resample

INF = float("inf")
NAN = float("nan")


@pytest.fixture
def resample_on_gpu():
    """``resample`` by the CUDA kernels, with CPU tensors in and out."""
    real = torch.cuda.is_available() and torch_winnow.build_info().cuda_library
    if not real and (reason := host_library.why_not()):
        pytest.skip(reason)

    def to(device, values):
        return [x.to(device) if isinstance(x, torch.Tensor) else x for x in values]

    def call(log_weights, **options):
        if real:
            options = dict(zip(options, to("cuda", options.values()), strict=True))
            return to("cpu", resample(log_weights.cuda(), **options))
        with host_library.in_place_of_the_cpu():
            return resample(log_weights, **options)

    return call


def assert_bitwise(result, expected):
    """Everything, log weights included: the same polynomials in the same order."""
    for name, got, wanted in zip(expected._fields, result, expected, strict=True):
        assert torch.equal(got, wanted), (name, got, wanted)


# A warp, a block, several parts of a block.
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("shape", [(3, 1), (2, 2, 17), (2, 513), (1, 8300)], ids=str)
def test_as_on_the_cpu(resample_on_gpu, scheme, shape):
    log_weights = 3 * torch.randn(shape)
    log_weights[..., ::5] = -INF
    for keep_slots in (False, True):
        options = {"scheme": scheme, "keep_slots": keep_slots, "seed": 5}
        expected = resample(log_weights, **options)
        assert_bitwise(resample_on_gpu(log_weights, **options), expected)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_option(resample_on_gpu, scheme):
    shape = (8, 40)
    log_weights = torch.linspace(0, 5, 8).unsqueeze(-1) * torch.randn(shape)
    mask = torch.rand(shape) < torch.linspace(0, 1, 8).unsqueeze(-1)
    pinned = torch.randint(40, (8,))
    for keep_slots, threshold, live, kept in itertools.product(
        (False, True), (None, 0.5), (None, mask), (None, pinned)
    ):
        options = {
            "scheme": scheme,
            "keep_slots": keep_slots,
            "ess_threshold": threshold,
            "mask": live,
            "pinned": kept,
            "seed": torch.tensor(-3),
        }
        expected = resample(log_weights, **options)
        assert_bitwise(resample_on_gpu(log_weights, **options), expected)


@pytest.mark.parametrize("scheme", [scheme for scheme in SCHEMES if scheme != "killing"])
@pytest.mark.parametrize("samples", [0, 3, 100])
def test_other_sample_counts(resample_on_gpu, scheme, samples):
    log_weights = 3 * torch.randn(2, 30)
    log_weights[1] = -INF
    options = {"scheme": scheme, "num_samples": samples, "seed": 1}
    assert_bitwise(resample_on_gpu(log_weights, **options), resample(log_weights, **options))


@pytest.mark.parametrize("wide", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(resample_on_gpu, wide):
    log_weights = (3 * torch.randn(4, 70)).to(wide)
    for scheme in SCHEMES:
        expected = resample(log_weights, scheme=scheme, seed=2)
        assert_bitwise(resample_on_gpu(log_weights, scheme=scheme, seed=2), expected)


@pytest.mark.parametrize("scheme", ["systematic", "stratified", "multinomial"])
@pytest.mark.parametrize("real", [torch.float32, torch.float64])
def test_given_uniforms(resample_on_gpu, scheme, real):
    log_weights = torch.randn(2, 20)
    uniforms = torch.rand(2 if scheme == "systematic" else (2, 20), dtype=real)
    options = {"scheme": scheme, "uniforms": uniforms}
    assert_bitwise(resample_on_gpu(log_weights, **options), resample(log_weights, **options))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_edges(resample_on_gpu, scheme):
    for weights in (
        [0.0, 0.0, 0.0],
        [1e30, 1e30, -1e30],
        [-3e38, -INF, -3e38],
        [-INF, -INF],
        [NAN, NAN],
        [NAN, -INF, 1.0],
        [INF, 5.0, INF, NAN],
        [],
    ):
        for dtype in (torch.float32, torch.float64):
            log_weights = torch.tensor(weights, dtype=dtype)
            expected = resample(log_weights, scheme=scheme, seed=0)
            assert_bitwise(resample_on_gpu(log_weights, scheme=scheme, seed=0), expected)


def set_order(order):
    if not torch.cuda.is_available():
        host_library.set_order(order)


# Three blocks of a team, taking turns in each order, and each option in one of them.
@pytest.mark.parametrize("scheme", SCHEMES)
def test_huge_populations(resample_on_gpu, scheme):
    log_weights = 2 * torch.randn(16_500)
    log_weights[::7] = -INF
    mask = torch.rand(16_500) < 0.9
    for order, options in (
        ("forward", {}),
        ("reverse", {"pinned": 9000, "keep_slots": True}),
        ("shuffled", {"pinned": 7000, "mask": mask.index_fill(0, torch.tensor(7000), True)}),
        ("reverse", {"mask": mask, "keep_slots": True}),
    ):
        options = {"scheme": scheme, "seed": 7, **options}
        set_order(order)
        assert_bitwise(resample_on_gpu(log_weights, **options), resample(log_weights, **options))


# Teams of three blocks with five parts of the population, and of two where the samples are many.
@pytest.mark.parametrize(
    ("scheme", "order", "dtype"),
    [
        ("optimal", "shuffled", torch.float64),
        ("ssp", "reverse", torch.bfloat16),
        ("residual", "shuffled", torch.float16),
    ],
)
def test_several_huge_populations(resample_on_gpu, scheme, order, dtype):
    log_weights = torch.randn(2, 33_000).to(dtype)
    log_weights[1, 50] = 30.0
    mask = torch.ones(2, 33_000, dtype=torch.bool)
    mask[0, 9000:] = False  # a member of its team has no share
    options = {"scheme": scheme, "mask": mask, "keep_slots": True, "seed": 3}
    set_order(order)
    assert_bitwise(resample_on_gpu(log_weights, **options), resample(log_weights, **options))
    few = log_weights[:1, :600]
    options = {"scheme": scheme, "num_samples": 17_000, "seed": 3}
    assert_bitwise(resample_on_gpu(few, **options), resample(few, **options))


def test_huge_populations_that_are_not_resampled(resample_on_gpu):
    log_weights = torch.randn(16_500)
    for weights, options in (
        (log_weights, {"ess_threshold": 0.01}),
        (log_weights, {"ess_threshold": 0.01, "mask": log_weights < 1.0}),
        (log_weights, {"mask": torch.zeros(16_500, dtype=torch.bool)}),
        (torch.full((16_500,), -INF), {}),
        (log_weights.index_fill(0, torch.tensor(16_400), NAN), {"ess_threshold": 0.9}),
        (log_weights.index_fill(0, torch.tensor([3, 16_400]), INF), {}),
    ):
        assert_bitwise(
            resample_on_gpu(weights, seed=1, **options), resample(weights, seed=1, **options)
        )


def test_one_launch(resample_on_gpu):
    if torch.cuda.is_available():
        pytest.skip("counts the emulator's launches")
    shapes = ((3, 40), (2, 700))
    for shape, scheme in [*itertools.product(shapes, SCHEMES), ((1, 16_500), "ssp")]:
        before = host_library.launches()
        resample_on_gpu(torch.randn(shape), scheme=scheme, seed=0, keep_slots=True)
        assert host_library.launches() == before + 1


def test_an_index_outside_pins_nothing(resample_on_gpu):
    log_weights = torch.randn(2, 9)
    expected = resample(log_weights, seed=4)
    for outside in (-1, 9, 2**40):
        pinned = torch.full((2,), outside)
        assert_bitwise(resample_on_gpu(log_weights, pinned=pinned, seed=4), expected)


def test_every_order(resample_on_gpu):
    log_weights = 2 * torch.randn(2, 600)
    for scheme in SCHEMES:
        expected = resample(log_weights, scheme=scheme, pinned=3, seed=4)
        for order in host_library.ORDERS:
            set_order(order)
            result = resample_on_gpu(log_weights, scheme=scheme, pinned=3, seed=4)
            assert_bitwise(result, expected)


def test_strided_views_and_status(resample_on_gpu):
    log_weights = torch.randn(6, 50)[::2, 3:40]
    mask = (torch.rand(6, 50) < 0.5)[::2, 3:40]
    expected = resample(log_weights, mask=mask, seed=0)
    assert_bitwise(resample_on_gpu(log_weights, mask=mask, seed=0), expected)
    nothing = resample_on_gpu(log_weights, mask=torch.zeros_like(mask), seed=0)
    assert (nothing[-1] == Status.NOTHING_LIVE).all()
