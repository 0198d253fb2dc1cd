"""soft_embedding on the GPU, against its definition and at its edges."""

from __future__ import annotations

import pytest
import torch

from conftest import TOLERANCE
from torch_winnow import reference
from torch_winnow.unmasking import soft_embedding

INF, NAN = float("inf"), float("nan")


def check(logits, embedding, **options):
    result = soft_embedding(logits, embedding, mask_id=0, **options)
    expected = reference.soft_embedding(logits.double(), embedding.double(), mask_id=0, **options)
    assert result.dtype == embedding.dtype
    torch.testing.assert_close(
        result.double(), expected, equal_nan=True, **TOLERANCE[embedding.dtype]
    )
    return result


@pytest.mark.parametrize("shape", [(1, 1), (2, 7), (2, 1, 256), (1, 8193)])
@pytest.mark.parametrize("width", [1, 300])
def test_matches_definition(gpu, shape, width, dtype):
    logits = (4 * torch.randn(shape)).to(gpu, dtype)
    check(logits, torch.randn(shape[-1], width, device=gpu).to(dtype), mix=0.8)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.0},
        {"temperature": 0.4, "top_p": 0.5, "mix": 1.0},
        {"top_p": None},
        {"top_p": None, "top_k": 3},
        {"top_k": 20, "top_p": 0.7},
        {"mix": 0.0},
    ],
    ids=str,
)
def test_options(gpu, options):
    logits = 3 * torch.randn(2, 900, device=gpu)
    logits[:, ::3] = -INF
    check(logits, torch.randn(950, 40, device=gpu), **options)


def test_dtypes_may_differ(gpu):
    logits, embedding = torch.randn(2, 50, device=gpu), torch.randn(50, 20, device=gpu)
    check(logits.to(torch.bfloat16), embedding)
    check(logits, embedding.half())
    check(logits.double(), embedding.double())


def test_more_columns_than_a_block_has(gpu):
    check(torch.randn(1, 20, device=gpu), torch.randn(20, 1100, device=gpu))


def test_only_the_nucleus_and_what_the_mask_leaves_is_read(gpu):
    logits = torch.full((3, 900), -5.0, device=gpu)
    logits[:, [3, 700]] = 9.0
    logits[1] = NAN
    embedding = torch.full((900, 8), NAN, device=gpu)
    embedding[[3, 700]] = torch.randn(2, 8, device=gpu)
    base = torch.randn(8, device=gpu)
    mask = torch.tensor([True, False, True], device=gpu)
    result = soft_embedding(logits, embedding, mask_embedding=base, mask=mask)
    assert result[mask].isfinite().all()
    assert (result[1] == 0).all()
    none = soft_embedding(logits[:1], embedding * NAN, mask_embedding=base, mix=0.0)
    assert torch.equal(none[0], base)


def test_rows_without_a_distribution(gpu):
    logits = torch.zeros(3, 100, device=gpu)
    logits[0, 50] = NAN
    logits[1] = -INF
    logits[2, 3] = INF
    assert soft_embedding(logits, torch.ones(100, 17, device=gpu), mask_id=0).isnan().all()


def test_results_depend_on_no_order(gpu, on_every_order):
    logits = torch.randn(2, 700, device=gpu)
    embedding = torch.randn(700, 40, device=gpu)[:, 3:]
    results = on_every_order(lambda: soft_embedding(logits, embedding, mask_id=5, mix=0.8))
    for result in results[1:]:
        assert torch.equal(result, results[0])


def test_errors_name_the_argument(gpu):
    with pytest.raises(ValueError, match="mix: expected a number in"):
        soft_embedding(
            torch.zeros(2, 5, device=gpu), torch.zeros(5, 2, device=gpu), mask_id=0, mix=2
        )
