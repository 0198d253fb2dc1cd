"""unmask_step_ as one operator: against its definition and against its own parts."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from torch_winnow import reference
from torch_winnow.unmasking import (
    ConfidenceFactor,
    ConfidenceThreshold,
    EntropyBound,
    EntropyThreshold,
    PrefixThreshold,
    TopK,
    logit_stats,
    select_positions,
    unmask_step_,
)

INF, NAN = float("inf"), float("nan")
MASK = 50
RULES = [
    EntropyThreshold(2.0),
    EntropyThreshold(2.0, max_tokens=2),
    EntropyThreshold(2.5, order="left_to_right"),
    EntropyBound(3.0),
    ConfidenceThreshold(0.3),
    ConfidenceFactor(1.5),
    TopK(3),
    TopK([1, 4, 2], score="margin"),
    TopK(2, score="entropy"),
    PrefixThreshold(0.2),
    PrefixThreshold(2.5, score="entropy"),
]


def problem(dtype=torch.float32, batch=3, length=12, vocab=60):
    tokens = torch.randint(0, vocab, (batch, length))
    tokens[torch.rand(batch, length) < 0.7] = MASK
    logits = 3 * torch.randn(batch, length, vocab) * torch.rand(batch, length, 1)
    return tokens, logits.to(dtype)


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.0, "shift": True},
        {"previous_logits": True},
        {"window": torch.tensor([[0, 5], [-3, 40], [7, 2]]), "suppress_ids": [1, 2]},
        {"mask": torch.arange(12).expand(3, 12) % 3 > 0, "top_k": 5, "statistics": "raw"},
        {"min_p": 0.1, "top_k": 20, "temperature": 0.6},
        {"top_p": 0.8, "target_ids": torch.zeros(3, 12, dtype=torch.int64), "step": 1},
    ],
    ids=lambda options: "+".join(options) or "plain",
)
def test_matches_definition(rule, options, dtype, device):
    tokens, logits = (x.to(device) for x in problem(dtype))
    options = {
        name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in options.items()
    }
    if "previous_logits" in options:
        options["previous_logits"] = logits.flip(-1)
    written, expected = tokens.clone(), tokens.clone()
    ours = unmask_step_(written, logits, mask_id=MASK, rule=rule, **options)
    theirs = reference.unmask_step_(expected, logits, mask_id=MASK, rule=rule, **options)
    assert torch.equal(ours.transfer, theirs.transfer)
    assert torch.equal(ours.count, theirs.count)
    assert torch.equal(written, expected)
    for name in ("entropy", "max_prob", "margin", "target_log_prob", "kl"):
        if (value := getattr(theirs.stats, name)) is not None:
            torch.testing.assert_close(getattr(ours.stats, name), value, rtol=3e-5, atol=3e-6)


@pytest.mark.parametrize("wide", [torch.float32, torch.float64])
def test_is_its_parts(wide):
    tokens, logits = problem(wide, vocab=3000)
    mask = tokens == MASK
    options = {"seed": 4, "temperature": 0.7, "previous_logits": logits.flip(-1)}
    stats = logit_stats(logits, mask=mask, suppress_ids=[MASK], **options)
    transfer, count = select_positions(stats.entropy, mask, EntropyBound(5.0))
    written = tokens.clone()
    result = unmask_step_(written, logits, mask_id=MASK, rule=EntropyBound(5.0), **options)
    for ours, theirs in zip(result.stats[:-1], stats[:-1], strict=True):
        assert ours is theirs is None or torch.equal(ours, theirs)
    assert torch.equal(result.transfer, transfer)
    assert torch.equal(result.count, count)
    assert torch.equal(written, torch.where(transfer, stats.token, tokens))


def test_tokens_may_be_strided_or_narrow():
    tokens, logits = problem()
    expected = tokens.clone()
    unmask_step_(expected, logits, mask_id=MASK, rule=TopK(2))
    narrow = tokens.int()
    unmask_step_(narrow, logits, mask_id=MASK, rule=TopK(2))
    assert torch.equal(narrow.long(), expected)
    strided = torch.zeros(12, 6, dtype=torch.int64).T[::2]
    strided.copy_(tokens)
    unmask_step_(strided, logits, mask_id=MASK, rule=TopK(2))
    assert torch.equal(strided, expected)


def test_a_row_of_nans_is_left_alone():
    tokens = torch.full((2, 3), MASK)
    logits = torch.full((2, 3, 60), NAN)
    logits[1, 1] = torch.randn(60)
    result = unmask_step_(tokens, logits, mask_id=MASK, rule=TopK(2))
    assert result.count.tolist() == [0, 1]
    assert (tokens != MASK).nonzero().tolist() == [[1, 1]]


def test_shift_reads_the_logits_before(on_every_capability):
    """Dream: the first position has its own logits, every other those of the one before."""
    logits = torch.randn(2, 5, 3000)
    shifted = torch.cat([logits[:, :1], logits[:, :-1]], 1)
    mask = torch.tensor([[True, True, False, True, False]]).expand(2, 5)
    options = {"mask": mask, "seed": 3, "target_ids": torch.arange(10).view(2, 5)}
    expected = logit_stats(shifted, previous_logits=shifted.flip(-1), **options)
    for result in on_every_capability(
        lambda: logit_stats(logits, previous_logits=logits.flip(-1), shift=True, **options)
    ):
        for ours, theirs in zip(result[:-1], expected[:-1], strict=True):
            assert torch.equal(ours, theirs)
    wide = logit_stats(logits.double(), shift=True, seed=3)
    assert torch.equal(wide.token, logit_stats(shifted.double(), seed=3).token)
    with pytest.raises(ValueError, match=r"logits: expected \(\.\.\., L, V\) with shift"):
        logit_stats(logits[0, 0], shift=True)


@pytest.mark.parametrize("temperature", [1e30, 1e50, 1e300])
@pytest.mark.parametrize("wide", [torch.float32, torch.float64])
def test_a_huge_temperature_is_uniform(temperature, wide, cpu_capability):
    logits = torch.tensor([[3.0, -2.0, 5.0, -INF], [1.5e38, -1.5e38, 0.0, 1.0]], dtype=wide)
    stats = logit_stats(logits, temperature=temperature, seed=1)
    expected = torch.tensor([math.log(3), math.log(4)], dtype=wide)
    torch.testing.assert_close(stats.entropy[0], expected[0])
    if temperature > 1e40:
        torch.testing.assert_close(stats.entropy[1], expected[1])
    assert (stats.token >= 0).all()


def test_a_double_draw_is_exact_in_the_tail():
    """A block 30 nats down, 1e-13 of the mass: 53-bit uniforms over the row hardly resolve it.

    Its clock must win in its due share, which a second block of equal mass shows: half of the draws
    go there, and to all of its tokens alike. Binomial, 5 standard deviations.
    """
    logits = torch.full((1, 3072), -60.0, dtype=torch.float64)
    logits[0, 1024:2048] = -math.log(1024)
    logits[0, 0] = 0.0
    token = logit_stats(logits.expand(2000, -1), seed=1).token
    assert abs(int((token >= 1024).sum()) - 1000) < 5 * math.sqrt(500)
    assert token[token >= 1024].unique().numel() > 500
    assert int(token.max()) < 2048


@pytest.mark.parametrize("mask_id", [np.int64(MASK), np.int32(MASK), MASK])
def test_integers_of_any_kind(mask_id):
    tokens, logits = problem()
    result = unmask_step_(
        tokens, logits, mask_id=mask_id, rule=TopK(1), seed=np.int64(3), suppress_ids=np.array([1])
    )
    assert (result.count == 1).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mask_id": 31.5}, "mask_id: expected an integer, got 31.5"),
        ({"mask_id": True}, "mask_id: expected an integer, got True"),
        ({"step": -1}, "step: expected at least 0, got -1"),
        ({"mask": [[True]]}, r"mask: expected a tensor, got \[\[True\]\]"),
        ({"window": [[0, 2]]}, "window: expected a tensor"),
        ({"window": torch.zeros(3, 2)}, "window: expected int64, got float32"),
        ({"logits": None}, "logits: expected a tensor, got None"),
        ({"tokens": [1]}, r"tokens: expected a tensor, got \[1\]"),
        ({"target_ids": 3}, "target_ids: expected a tensor, got 3"),
        ({"seed": 1.5}, "seed: expected an integer, got 1.5"),
        (
            {"vocab_start": 0},
            "vocab_start: expected None, as a step needs the whole vocabulary, got 0",
        ),
    ],
)
def test_errors_name_the_argument(arguments, message):
    tokens, logits = problem()
    call = {"tokens": tokens, "logits": logits, "mask_id": MASK, "rule": TopK(1), **arguments}
    before = tokens.clone()
    with pytest.raises(ValueError, match=message):
        unmask_step_(call.pop("tokens"), call.pop("logits"), **call)
    assert torch.equal(tokens, before)


def test_opcheck_and_compile():
    tokens, logits = problem()
    window = torch.tensor([[0, 9], [1, 12], [3, 4]])
    torch.library.opcheck(
        torch.ops.winnow.unmask_step_.default,
        (tokens.clone(), logits, MASK, tokens > 3, window, 0.7, torch.tensor([1]), tokens, logits,
         logits, 0.5, 5, 0.9, 0.1, torch.tensor(3), False, True, 1, 1, 1, 0.5, -1, None),
    )  # fmt: skip

    def step(tokens, logits):
        result = unmask_step_(tokens, logits, mask_id=MASK, rule=EntropyThreshold(2.0), seed=1)
        return result.count

    ours, theirs = tokens.clone(), tokens.clone()
    count = torch.compile(step, fullgraph=True)(ours, logits)
    assert torch.equal(count, step(theirs, logits))
    assert torch.equal(ours, theirs)
