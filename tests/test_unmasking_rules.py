"""select_positions: every rule against its definition and at its boundaries."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torch_winnow import reference
from torch_winnow.unmasking import (
    ConfidenceFactor,
    ConfidenceThreshold,
    EntropyBound,
    EntropyThreshold,
    PrefixThreshold,
    TopK,
    select_positions,
)

NAN = float("nan")
RULES = [
    EntropyThreshold(0.5),
    EntropyThreshold(1.5, max_tokens=2),
    EntropyThreshold(1.5, order="left_to_right"),
    EntropyThreshold(1.5, max_tokens=1, order="left_to_right"),
    EntropyBound(0.0),
    EntropyBound(1.0),
    ConfidenceThreshold(0.5),
    ConfidenceFactor(1.0),
    TopK(2),
    TopK((3, 1, 2), score="margin"),
    TopK(2, score="entropy"),
    TopK(1, score="random"),
    PrefixThreshold(0.5),
    PrefixThreshold(0.5, score="margin"),
    PrefixThreshold(0.5, score="entropy"),
]


@pytest.fixture
def chosen(device):
    """Positions that a rule takes of one row of scores."""

    def choose(scores, rule, mask=None, **options):
        score = torch.tensor([scores], device=device)
        masked = torch.tensor([mask or [True] * len(scores)], device=device)
        transfer, count = select_positions(score, masked, rule, **options)
        assert count.tolist() == [int(transfer.sum())]
        return transfer[0].nonzero()[:, 0].tolist()

    return choose


@pytest.mark.parametrize("rule", RULES, ids=str)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_matches_definition(rule, data):
    batch = data.draw(st.integers(0, 3))
    length = data.draw(st.integers(0, 9))
    cell = st.tuples(st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0, 1.5, NAN]), st.booleans())
    cells = data.draw(st.lists(cell, min_size=batch * length, max_size=batch * length))
    score = torch.tensor([c[0] for c in cells]).view(batch, length)
    mask = torch.tensor([c[1] for c in cells], dtype=torch.bool).view(batch, length)
    window = None
    if data.draw(st.booleans()):
        ends = data.draw(st.lists(st.integers(-2, 12), min_size=2 * batch, max_size=2 * batch))
        window = torch.tensor(ends, dtype=torch.int64).view(batch, 2)
    step = data.draw(st.integers(0, 4))
    transfer, count = select_positions(score, mask, rule, window=window, step=step)
    expected, expected_count = reference.select_positions(
        score, mask, rule, window=window, step=step
    )
    assert torch.equal(transfer, expected)
    assert torch.equal(count, expected_count)
    position = torch.arange(length)
    allowed = mask
    if window is not None:
        allowed = mask & (position >= window[:, :1]) & (position < window[:, 1:])
    assert not (transfer & ~allowed).any()
    assert torch.equal(count > 0, allowed.any(1))


def test_boundaries_are_part_of_the_rules(chosen):
    # Entropy thresholds are strict.
    assert chosen([0.5, 0.25, 0.5, 0.75], EntropyThreshold(0.5)) == [1]
    assert chosen([0.25, 0.5, 0.25], EntropyThreshold(0.5, order="left_to_right")) == [0]
    # The bound is not: without the largest, 0.25 + 0.25 = 0.5.
    assert chosen([0.25, 0.75, 0.25, 2.0], EntropyBound(0.5)) == [0, 1, 2]
    assert chosen([0.25, 0.75, 0.25, 2.0], EntropyBound(0.4999)) == [0, 2]
    assert chosen([0.25, 0.75, 0.25, 2.0], EntropyBound(1.25)) == [0, 1, 2, 3]
    # Confidence, margin and prefix thresholds take equality.
    assert chosen([0.5, 0.4, 0.75], ConfidenceThreshold(0.5)) == [0, 2]
    assert chosen([0.5, 0.75, 0.4, 0.9], PrefixThreshold(0.5)) == [0, 1]
    # (2)(0.25) < 1, (3)(0.5) is not: strict, and the second reaches exactly 3 * (1/3).
    assert chosen([0.75, 0.5], ConfidenceFactor(1.0)) == [0]
    assert chosen([0.75, 0.75], ConfidenceFactor(0.75)) == [0]
    assert chosen([0.75, 0.75], ConfidenceFactor(0.7501)) == [0, 1]


def test_boundaries_are_those_of_the_scores_dtype(chosen):
    # 0.9, 0.2 and 0.1 + 0.2 are other numbers in float32 than in float64.
    assert chosen([0.9, 0.95, 0.1], ConfidenceThreshold(0.9)) == [0, 1]
    assert chosen([0.2, 0.1], EntropyThreshold(0.2)) == [1]
    assert chosen([0.1, 0.2, 0.9], EntropyBound(0.3)) == [0, 1, 2]


@pytest.mark.parametrize(
    ("rule", "best"),
    [
        (EntropyThreshold(0.0), 2),
        (EntropyThreshold(0.0, order="left_to_right"), 0),
        (EntropyBound(0.0), 2),
        (ConfidenceThreshold(2.0), 1),
        (ConfidenceFactor(0.0), 1),
        (TopK(0), 1),
        (TopK(1, score="entropy"), 2),
        (PrefixThreshold(2.0), 0),
    ],
    ids=str,
)
def test_at_least_one_and_which(chosen, rule, best):
    assert chosen([0.5, 0.75, 0.25, 0.25, 0.75], rule) == [best]  # ties: the lowest position


def test_nan_comes_last(chosen):
    for rule in RULES:
        assert chosen([NAN, NAN, 0.4], rule)[:1] in ([2], [0])
        assert 2 in chosen([NAN, NAN, 0.4], rule)
        assert chosen([NAN, NAN], rule)[0] == 0  # but a row never stands still
    assert chosen([0.1, NAN, 0.1], EntropyThreshold(0.5)) == [0, 2]
    assert chosen([0.1, NAN, 0.1], EntropyThreshold(0.5, order="left_to_right")) == [0]
    assert chosen([0.9, NAN, 0.8], TopK(2)) == [0, 2]


def test_runs_skip_what_is_already_unmasked(chosen):
    mask = [True, False, True, True]
    assert chosen([0.1, 9.0, 0.1, 9.0], EntropyThreshold(0.5, order="left_to_right"), mask) == [
        0,
        2,
    ]
    assert chosen([0.9, 0.0, 0.9, 0.1], PrefixThreshold(0.9), mask) == [0, 2]


def test_schedule_and_dtypes(chosen, device):
    rule = TopK([3, 1], score="entropy")
    scores = [0.1, 0.2, 0.3, 0.4]
    assert [len(chosen(scores, rule, step=step)) for step in range(4)] == [3, 1, 1, 1]
    score = torch.tensor([[0.2, 0.1, 0.3]], device=device)
    mask = torch.ones(1, 3, dtype=torch.bool, device=device)
    for wide in (torch.float64, torch.bfloat16, torch.float16):
        transfer, _ = select_positions(score.to(wide), mask, TopK(1))
        assert transfer.tolist() == [[False, False, True]]
    strided = torch.rand(8, 6, device=device).T
    masks = torch.rand(8, 6, device=device).T > 0.5
    assert torch.equal(
        select_positions(strided, masks, TopK(2))[0],
        select_positions(strided.contiguous(), masks.contiguous(), TopK(2))[0],
    )


def test_same_for_any_number_of_threads(on_thread_counts):
    score = torch.rand(200, 64)
    mask = torch.rand(200, 64) < 0.7
    results = on_thread_counts(lambda: select_positions(score, mask, EntropyBound(1.0)))
    assert all(torch.equal(transfer, results[0][0]) for transfer, _ in results)


def test_opcheck_and_compile():
    score = torch.rand(2, 5)
    mask = torch.tensor([[True, True, False, True, False]] * 2)
    window = torch.tensor([[0, 3], [1, 5]])
    torch.library.opcheck(
        torch.ops.winnow.select_positions.default,
        (score, mask, 0, 0, 0.5, -1, window, torch.tensor([1, 2]), None),
    )
    for rule in (EntropyThreshold(0.5), TopK((2, 1)), PrefixThreshold(0.5)):
        compiled = torch.compile(select_positions, fullgraph=True)
        expected = select_positions(score, mask, rule, window=window)
        for ours, theirs in zip(compiled(score, mask, rule, window=window), expected, strict=True):
            assert torch.equal(ours, theirs)
        torch.compiler.reset()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EntropyThreshold(NAN), "threshold: expected a number, got nan"),
        (lambda: EntropyThreshold(0.1, order="right"), "order: expected one of any, left_to_right"),
        (lambda: EntropyThreshold(0.1, max_tokens=0), "max_tokens: expected None or at least 1"),
        (lambda: EntropyBound(-0.1), "gamma: expected a number >= 0, got -0.1"),
        (lambda: TopK(()), "num_tokens: expected at least one step"),
        (lambda: TopK(1, score="loudness"), "score: expected one of confidence, margin, entropy"),
        (lambda: PrefixThreshold(0.1, score="random"), "score: expected one of confidence, margin"),
    ],
)
def test_rules_check_themselves(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"score": torch.zeros(3)}, r"score: expected \(B, L\), got shape \(3,\)"),
        ({"score": torch.zeros(1, 3, dtype=torch.int64)}, "score: expected float32 or float64"),
        ({"mask": torch.ones(1, 3)}, "mask: expected bool, got float32"),
        ({"mask": torch.ones(1, 4, dtype=torch.bool)}, "mask: expected the shape of score"),
        ({"window": torch.zeros(1, 3, dtype=torch.int64)}, r"window: expected \(B, 2\) with B=1"),
        ({"window": torch.zeros(1, 2)}, "window: expected int64, got float32"),
        ({"rule": 0.3}, "rule: expected EntropyThreshold, .* got float"),
    ],
)
def test_errors_name_the_argument(arguments, message):
    given_arguments = {
        "score": torch.zeros(1, 3),
        "mask": torch.ones(1, 3, dtype=torch.bool),
        "rule": TopK(1),
        **arguments,
    }
    with pytest.raises(ValueError, match=message):
        select_positions(**given_arguments)
