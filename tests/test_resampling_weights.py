"""effective_sample_size against its definition, and at its edges."""

from __future__ import annotations

import pytest
import torch

from conftest import TOLERANCE
from torch_winnow import reference
from torch_winnow.resampling import effective_sample_size, resample

INF = float("inf")
EDGES = [
    ([0.0] * 7, 7.0),
    ([1e30, 1e30, -1e30], 2.0),
    ([-INF] * 3, 0.0),
    ([float("nan")] * 2, 0.0),
    ([0.0, float("nan"), 0.0], 2.0),
    ([INF, 5.0, INF, float("nan")], 2.0),
    ([-3e38, -INF], 1.0),
]
SHAPES = [(1,), (15,), (16,), (17,), (3, 64), (2, 3, 1000), (0, 4), (2, 0)]


@pytest.mark.parametrize("shape", SHAPES)
def test_matches_definition(shape, dtype, cpu_capability):
    log_weights = (3 * torch.randn(shape)).to(dtype)
    result = effective_sample_size(log_weights)
    assert result.dtype == torch.float32
    expected = reference.effective_sample_size(log_weights.double())
    torch.testing.assert_close(result.double(), expected, **TOLERANCE[torch.float32])


@pytest.mark.parametrize(("weights", "expected"), EDGES)
@pytest.mark.parametrize("wide", [torch.float32, torch.float64])
def test_edges(weights, expected, wide, cpu_capability):
    result = effective_sample_size(torch.tensor(weights, dtype=wide))
    assert result.item() == pytest.approx(expected, rel=1e-6)
    assert result.dtype == wide
    assert reference.effective_sample_size(torch.tensor(weights, dtype=wide)).item() == (
        pytest.approx(expected, rel=1e-6)
    )


def test_strided_input_needs_no_copy():
    log_weights = torch.randn(6, 50)[::2, 3:40]
    expected = effective_sample_size(log_weights.contiguous())
    assert torch.equal(effective_sample_size(log_weights), expected)
    transposed = torch.randn(40, 6).T
    assert torch.equal(effective_sample_size(transposed), effective_sample_size(transposed.clone()))


def test_bitwise_equal_everywhere(on_every_capability, on_thread_counts):
    log_weights = torch.randn(300, 777)
    results = on_every_capability(lambda: effective_sample_size(log_weights))
    results += on_thread_counts(lambda: effective_sample_size(log_weights))
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("wide", [torch.float32, torch.bfloat16, torch.float64])
def test_says_the_same_as_resample(wide, cpu_capability):
    for shape in ((40, 3), (5, 300), (2, 20_000)):
        log_weights = (3 * torch.randn(shape)).to(wide)
        assert torch.equal(effective_sample_size(log_weights), resample(log_weights, seed=0).ess)


def test_opcheck_and_compile():
    log_weights = torch.randn(3, 20)
    torch.library.opcheck(torch.ops.winnow.effective_sample_size.default, (log_weights,))
    compiled = torch.compile(effective_sample_size, fullgraph=True)
    assert torch.equal(compiled(log_weights), effective_sample_size(log_weights))


def test_errors_name_the_argument():
    with pytest.raises(ValueError, match=r"log_weights: expected a floating tensor.*got list"):
        effective_sample_size([0.0, 1.0])
    with pytest.raises(ValueError, match=r"log_weights: expected float32.*got int64"):
        effective_sample_size(torch.ones(3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"log_weights: expected \(\.\.\., K\), got a scalar"):
        effective_sample_size(torch.tensor(1.0))
