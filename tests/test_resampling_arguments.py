"""What resample accepts as arguments, and what it says of others."""

from __future__ import annotations

import numpy
import pytest
import torch

from torch_winnow import reference
from torch_winnow.resampling import resample, sample_without_replacement


@pytest.mark.filterwarnings("error")
def test_decisions_take_weights_as_numbers():
    log_weights = torch.randn(3, 8, requires_grad=True)
    uniforms = torch.rand(3, requires_grad=True)
    for options in ({"seed": 0}, {"uniforms": uniforms}):
        result = resample(log_weights, **options)
        differentiable = [name for name, x in result._asdict().items() if x.requires_grad]
        assert differentiable == ["log_weights", "log_z"]
        expected = reference.resample(log_weights.detach(), **options)
        assert torch.equal(result.ancestors, expected.ancestors)


def test_seeds():
    log_weights = torch.randn(3, 8)
    expected = resample(log_weights, seed=5)
    for seed in (numpy.int64(5), numpy.uint8(5), torch.tensor(5)):
        assert torch.equal(resample(log_weights, seed=seed).ancestors, expected.ancestors)
    compiled = torch.compile(lambda x, seed: resample(x, seed=seed), fullgraph=True)
    for seed in (5, torch.tensor(5)):
        assert torch.equal(compiled(log_weights, seed).ancestors, expected.ancestors)
    for seed, got in ((1.5, "float"), ("1", "str"), (numpy.float32(1), "float32")):
        with pytest.raises(ValueError, match=f"seed: expected an int or .*got {got}"):
            resample(log_weights, seed=seed)
    for seed in (2**63, -(2**63) - 1):
        with pytest.raises(ValueError, match="seed: expected a number of 64 bits"):
            resample(log_weights, seed=seed)
    for seed in (0, torch.tensor(0)):
        with pytest.raises(ValueError, match="seed: expected either a seed or a generator"):
            resample(log_weights, seed=seed, generator=torch.Generator())


def test_generator_is_one_of_torch():
    weights = torch.zeros(3)
    for call in (resample, lambda x, **o: sample_without_replacement(x, 2, **o)):
        with pytest.raises(ValueError, match="generator: expected a torch.Generator, got int"):
            call(weights, generator=3)
        with pytest.raises(
            ValueError, match="generator: expected a torch.Generator, got Generator"
        ):
            call(weights, generator=numpy.random.default_rng())


@pytest.mark.filterwarnings("error")
def test_opcheck_of_weights_that_require_grad():
    """The operators take weights as numbers; gradients are the functions' business."""
    x = torch.randn(3, 20, requires_grad=True)
    ops = torch.ops.winnow
    for name, arguments in (
        ("effective_sample_size", ()),
        ("weight_entropy", ()),
        ("log_mean_exp", ()),
        ("conditional_effective_sample_size", (x,)),
        ("resample", ("residual", None, 0.9, False, None, None, None, 0, None)),
        ("sample_without_replacement", (3, "pareto", 0, None)),
        ("inclusion_probabilities", (3,)),
        ("next_temperature", (torch.zeros(3), 0.5, 1.0, None)),
    ):
        torch.library.opcheck(getattr(ops, name).default, (x, *arguments))
        results = getattr(ops, name)(x, *arguments)
        for result in results if isinstance(results, (list, tuple)) else (results,):
            assert not result.requires_grad


def test_arguments_are_tensors():
    weights = torch.zeros(3)
    with pytest.raises(ValueError, match="log_weights: expected a floating tensor .*got ndarray"):
        resample(numpy.zeros(3))
    with pytest.raises(ValueError, match="mask: expected a bool tensor .*got list"):
        resample(weights, mask=[True, True, False])
    with pytest.raises(ValueError, match="uniforms: expected a float32 or float64 tensor.*float"):
        resample(weights, uniforms=0.5)
