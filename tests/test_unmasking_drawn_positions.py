"""Positions drawn in proportion to their scores: Dream's ``alg_temp``."""

from __future__ import annotations

import itertools

import pytest
import torch

from torch_winnow import reference
from torch_winnow.unmasking import (
    TopK,
    generate,
    logit_stats,
    select_positions,
    unmask_step_,
)

VOCAB = 12
MASK = VOCAB - 1


@pytest.fixture
def model():
    """Logits that depend on the position and on the tokens of the row."""
    table = torch.randn(VOCAB, VOCAB, dtype=torch.float64)
    place = 2 * torch.randn(20, VOCAB, dtype=torch.float64)

    def run(tokens):
        return table[tokens].mean(1, keepdim=True) + place[: tokens.shape[1]]

    return run


@pytest.mark.parametrize("score", ["confidence", "margin", "entropy"])
def test_they_follow_the_weights_without_replacement(score):
    """Ordered pairs of positions come at the products of their conditional probabilities."""
    logits = torch.randn(1, 4, 6, dtype=torch.float64)
    rule = TopK(1, score=score, position_temperature=0.3)
    stats = logit_stats(logits)
    value = {"confidence": stats.max_prob, "margin": stats.margin, "entropy": -stats.entropy}
    weight = (value[score][0] / 0.3).softmax(0).tolist()

    def model(tokens):
        return logits.expand(len(tokens), 4, 6)

    for decode, rows in ((generate, 3000), (reference.generate, 60)):
        tokens = torch.full((rows, 4), 6)
        result = decode(model, tokens, mask_id=6, rule=rule, seed=4, temperature=0.0)
        order = result.step_map.argsort(1)
        for i, j in itertools.permutations(range(4), 2):
            exact = weight[i] * weight[j] / (1 - weight[i])
            seen = float(((order[:, 0] == i) & (order[:, 1] == j)).double().mean())
            error = (exact * (1 - exact) / rows) ** 0.5
            assert abs(seen - exact) < 4.5 * error  # seven in a million each


def test_they_keep_the_schedule_and_the_seed(model):
    tokens = torch.full((3, 17), MASK)
    tokens[1, 3:6] = 2
    options = {"mask_id": MASK, "block_length": 6, "temperature": 0.0}

    def decode(rule, seed, by=generate):
        return by(model, tokens, rule=rule, seed=seed, **options).step_map

    rule = TopK((3, 1, 2), score="margin", position_temperature=0.5)
    drawn = decode(rule, 1)
    assert torch.equal(drawn, decode(rule, 1))
    assert not torch.equal(drawn, decode(rule, 2))
    for row, other in zip(drawn, decode(rule, 1, reference.generate), strict=True):
        assert row[row >= 0].bincount().tolist() == other[other >= 0].bincount().tolist()
    cold = TopK((3, 1, 2), score="margin", position_temperature=1e-12)
    assert torch.equal(decode(cold, 1), decode(TopK((3, 1, 2), score="margin"), 1))


def test_they_come_with_fresh_chance_where_no_seed_is_given(model):
    tokens = torch.full((1, 17), MASK)
    rule = TopK(1, position_temperature=10.0)
    first, second = (generate(model, tokens, mask_id=MASK, rule=rule) for _ in range(2))
    assert not torch.equal(first.step_map, second.step_map)


def test_lost_rows_are_never_drawn(model):
    def broken(tokens):
        logits = model(tokens)[:, :8].clone()
        logits[0, 2] = float("nan") if bool((tokens[0, :2] == MASK).any()) else 0.0
        return logits

    rule = TopK(1, position_temperature=5.0)
    result = generate(broken, torch.full((1, 8), MASK), mask_id=MASK, rule=rule, seed=0)
    assert int(result.step_map[0, 2]) > int(result.step_map[0, :2].max())


def test_they_are_of_generate_alone():
    rule = TopK(1, position_temperature=0.5)
    message = "rule: expected position_temperature=0, as only generate and Decoding"
    with pytest.raises(ValueError, match=message):
        select_positions(torch.zeros(1, 2), torch.ones(1, 2, dtype=torch.bool), rule)
    with pytest.raises(ValueError, match=message):
        unmask_step_(torch.zeros(1, 2).long(), torch.zeros(1, 2, 3), mask_id=0, rule=rule)
    with pytest.raises(ValueError, match="position_temperature: expected 0 with score='random'"):
        TopK(1, score="random", position_temperature=0.5)
    with pytest.raises(ValueError, match="position_temperature: expected a number >= 0, got -1"):
        TopK(1, position_temperature=-1)
