"""effective_sample_size on the GPU, against its definition and at its edges."""

from __future__ import annotations

import pytest
import torch

from conftest import TOLERANCE
from test_resampling_weights import EDGES, INF
from torch_winnow import reference
from torch_winnow.resampling import effective_sample_size


# A warp per population, one block, and several blocks each.
@pytest.mark.parametrize(
    "shape", [(1,), (33,), (9, 64), (2, 3, 512), (2, 513), (2, 140_000), (0, 4), (2, 0)]
)
def test_matches_definition(gpu, shape, dtype):
    log_weights = (3 * torch.randn(shape)).to(gpu, dtype)
    result = effective_sample_size(log_weights)
    assert result.dtype == torch.float32
    expected = reference.effective_sample_size(log_weights.double())
    torch.testing.assert_close(result.double(), expected, **TOLERANCE[torch.float32])


@pytest.mark.parametrize("padding", [0, 600], ids=["warp", "block"])
@pytest.mark.parametrize(("weights", "expected"), EDGES)
@pytest.mark.parametrize("wide", [torch.float32, torch.float64])
def test_edges(gpu, weights, expected, wide, padding):
    log_weights = torch.tensor([*weights, *[-INF] * padding], dtype=wide, device=gpu)
    assert effective_sample_size(log_weights).item() == pytest.approx(expected, rel=1e-6)


def test_strided_views(gpu):
    log_weights = torch.randn(6, 900, device=gpu)[::2, 3:800]
    expected = effective_sample_size(log_weights.contiguous())
    assert torch.equal(effective_sample_size(log_weights), expected)
    transposed = torch.randn(40, 6, device=gpu).T
    assert torch.equal(effective_sample_size(transposed), effective_sample_size(transposed.clone()))


def test_bitwise_equal_in_every_order(gpu, on_every_order):
    log_weights = torch.randn(2, 140_000, device=gpu)
    results = on_every_order(lambda: effective_sample_size(log_weights))
    assert all(torch.equal(result, results[0]) for result in results)


def test_equal_particles_count_exactly(gpu):
    assert effective_sample_size(torch.zeros(1_000_003, device=gpu)).item() == 1_000_003


def test_errors_name_the_argument(gpu):
    with pytest.raises(ValueError, match=r"log_weights: expected float32.*got int64"):
        effective_sample_size(torch.ones(3, dtype=torch.int64, device=gpu))
    with pytest.raises(ValueError, match=r"log_weights: expected \(\.\.\., K\), got a scalar"):
        effective_sample_size(torch.tensor(1.0, device=gpu))
