"""Parts of a vocabulary on the GPU: what the whole gives, and what the CPU draws."""

from __future__ import annotations

import pytest
import torch

from torch_winnow import reference
from torch_winnow._unmasking.linear import _all_rows
from torch_winnow._unmasking.logit_stats import as_stats
from torch_winnow.unmasking import (
    LogitStats,
    linear_logit_stats,
    logit_stats,
    merge_logit_stats,
)

INF, NAN = float("inf"), float("nan")


def in_parts(logits: torch.Tensor, cuts: list[int], **options) -> list[LogitStats]:
    edges = [0, *cuts, logits.shape[-1]]
    rows = ("previous_logits", "unconditional_logits")
    return [
        logit_stats(
            logits[..., a:b],
            vocab_start=a,
            **{name: v[..., a:b] if name in rows else v for name, v in options.items()},
        )
        for a, b in zip(edges, edges[1:], strict=False)
    ]


def assert_equal(result: LogitStats, expected: LogitStats) -> None:
    for name, ours, theirs in zip(LogitStats._fields[:-1], result, expected, strict=False):
        assert (ours is None) == (theirs is None), name
        if theirs is not None:
            assert torch.equal(ours.nan_to_num(nan=-7.0), theirs.nan_to_num(nan=-7.0)), name


CUTS = [[], [1024], [2048, 8192], [700], [1, 1000, 1023, 5000], [0, 8999, 9000]]


@pytest.mark.parametrize("cuts", CUTS, ids=str)
@pytest.mark.parametrize("wide", [torch.float32, torch.float64])
def test_any_cut_gives_the_same_bits(gpu, cuts, wide):
    logits = (4 * torch.randn(6, 9000)).to(gpu, wide)
    logits[1, 8000], logits[2], logits[3, 17] = INF, -INF, NAN
    options = {
        "previous_logits": logits + torch.randn_like(logits),
        "unconditional_logits": logits + torch.randn_like(logits),
        "cfg_scale": 0.5,
        "temperature": 0.7,
        "target_ids": torch.tensor([0, 3, 5, 8999, 1023, 4], device=gpu),
        "suppress_ids": torch.tensor([3, 1024, 8998], device=gpu),
        "mask": torch.tensor([True, True, True, True, False, True], device=gpu),
        "seed": torch.tensor(5, device=gpu),
    }
    assert_equal(
        merge_logit_stats(in_parts(logits, cuts, **options)), logit_stats(logits, **options)
    )


@pytest.mark.parametrize("cuts", [[2048, 8192], [700, 5001]], ids=str)
@pytest.mark.parametrize("statistics", ["raw", "processed"])
def test_short_dtypes(gpu, cuts, statistics):
    logits = (4 * torch.randn(3, 9216)).to(gpu, torch.bfloat16)
    options = {"temperature": 0.6, "statistics": statistics, "seed": 3}
    assert_equal(
        merge_logit_stats(in_parts(logits, cuts, **options)), logit_stats(logits, **options)
    )


def test_merged_parts_merge_again(gpu):
    logits = torch.randn(2, 5000, device=gpu)
    low, middle, high = in_parts(logits, [700, 3333], seed=1)
    twice = merge_logit_stats([merge_logit_stats([high, middle]), low])
    assert_equal(twice, logit_stats(logits, seed=1))


def test_a_part_describes_itself(gpu):
    logits = torch.randn(4, 3000, device=gpu)
    target = torch.tensor([1200, 999, 2500, 0], device=gpu)
    part = logit_stats(
        logits[:, 1000:2500],
        vocab_start=1000,
        target_ids=target,
        suppress_ids=torch.tensor([3, 1100, 2999], device=gpu),
    )
    narrow = logits[:, 1000:2500].double()
    narrow[:, 100] = -INF
    own = reference.logit_stats(narrow.cpu(), target_ids=torch.tensor([200, 0, 0, 0]))
    assert torch.equal(part.argmax.cpu(), own.argmax + 1000)
    torch.testing.assert_close(part.entropy.cpu().double(), own.entropy, rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(part.target_log_prob[0].cpu().double(), own.target_log_prob[0],
                               rtol=2e-5, atol=2e-5)  # fmt: skip
    assert part.target_log_prob[1:].tolist() == [-INF] * 3
    assert merge_logit_stats([part]).token.tolist() == part.token.tolist()


def test_no_rows_and_no_tokens(gpu):
    empty = merge_logit_stats(in_parts(torch.randn(0, 3000, device=gpu), [7]))
    assert empty.token.shape == (0,)
    nothing = merge_logit_stats(in_parts(torch.randn(2, 0, device=gpu), [0]))
    assert nothing.token.tolist() == [-1, -1]
    assert nothing.entropy.isnan().all()


def drawn(device, dtype):
    logits = (2 * torch.randn(40, 9001, generator=torch.Generator().manual_seed(4))).to(dtype)
    options = {"seed": 11, "temperature": 0.8}
    return torch.stack([
        logit_stats(logits.to(device), **options).token.cpu(),
        logit_stats(logits.to(device), top_p=0.9, **options).token.cpu(),
    ])  # fmt: skip


@pytest.fixture
def drawn_on_the_cpu(dtype):
    return drawn("cpu", dtype)  # before the GPU takes its place


def test_draws_are_those_of_the_cpu(drawn_on_the_cpu, gpu, dtype):
    """Up to rounding: a uniform within 1e-6 of the border between two tokens may tell."""
    assert (drawn(gpu, dtype) == drawn_on_the_cpu).float().mean() >= 0.97


@pytest.mark.parametrize("short", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("how", ["operator", "all rows"])
def test_linear(gpu, short, how):
    hidden = torch.randn(2, 3, 8, device=gpu).to(short)
    weight, bias = torch.randn(2500, 8, device=gpu).to(short), torch.randn(2500).to(gpu, short)
    options = {
        "mask": torch.tensor([[True, False, True], [True, True, True]], device=gpu),
        "target_ids": torch.full((2, 3), 2400, device=gpu),
        "suppress_ids": torch.tensor([5], device=gpu),
        "temperature": 0.7,
        "seed": 3,
        "shift": True,
    }
    if how == "operator":
        result = linear_logit_stats(hidden, weight, bias, **options)
    else:  # what a GPU runs
        seed = torch.tensor(3, device=gpu)
        ids = [options[name] for name in ("suppress_ids", "target_ids")]
        statistics = _all_rows(hidden, weight, bias, options["mask"], 0.7, *ids, seed, False, True)
        result = as_stats(statistics, True, False)
    expected = logit_stats(torch.nn.functional.linear(hidden, weight, bias), **options)
    assert torch.equal(result.token, expected.token)
    for name in ("log_prob", "entropy", "margin", "target_log_prob"):
        tolerance = 1e-4 if short == torch.float32 else 2e-2
        ours, theirs = getattr(result, name), getattr(expected, name)
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
