"""unmask_step_ and generate against their definitions, and as users meet them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from torch_winnow import reference
from torch_winnow.unmasking import (
    AnswerEntropy,
    ConfidenceFactor,
    ConfidenceThreshold,
    EntropyBound,
    EntropyThreshold,
    PrefixThreshold,
    TopK,
    generate,
    unmask_step_,
)

VOCAB = 40
MASK = VOCAB - 1
RULES = [
    EntropyThreshold(0.5),
    EntropyThreshold(1.5, max_tokens=2),
    EntropyThreshold(1.5, order="left_to_right"),
    EntropyBound(1.0),
    ConfidenceThreshold(0.5),
    ConfidenceFactor(1.0),
    TopK(2),
    TopK((3, 1, 2), score="margin"),
    TopK(2, score="entropy"),
    PrefixThreshold(0.4),
]


@pytest.fixture
def model():
    """Every position's logits depend on all tokens to the left, the mask's are the largest."""
    table = 3 * torch.randn(VOCAB, VOCAB)
    place = torch.randn(64, VOCAB)

    def run(tokens):
        length = tokens.shape[1]
        scale = torch.arange(1, length + 1).sqrt()[:, None]
        logits = table[tokens].cumsum(1) / scale + place[:length]
        logits[..., MASK] = 50.0
        return logits

    return run


def prompt(batch=3, length=17):
    tokens = torch.randint(0, MASK, (batch, length))
    tokens[torch.rand(batch, length) < 0.8] = MASK
    tokens[0, :5] = 3
    return tokens


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_step_matches_definition(rule, model):
    tokens = prompt()
    window = torch.tensor([[0, 17], [4, 9], [30, 40]])
    expected = tokens.clone()
    transfer, count, stats = reference.unmask_step_(
        expected, model(tokens), mask_id=MASK, rule=rule, window=window, temperature=0.5
    )
    logits = model(tokens)
    result = unmask_step_(tokens, logits, mask_id=MASK, rule=rule, window=window, temperature=0.5)
    assert torch.equal(tokens, expected)
    assert torch.equal(result.transfer, transfer)
    assert torch.equal(result.count, count)
    assert result.count[2] == 0
    torch.testing.assert_close(result.stats.entropy, stats.entropy, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize(("block_length", "steps"), [(None, None), (5, None), (4, 3), (1, 1)])
def test_generate_matches_definition(rule, block_length, steps, model):
    tokens = prompt()
    before = tokens.clone()
    options = {"mask_id": MASK, "rule": rule, "block_length": block_length, "steps": steps}
    result = generate(model, tokens, **options)
    expected = reference.generate(model, tokens, **options)
    assert torch.equal(tokens, before)
    assert torch.equal(result.tokens, expected[0])
    assert torch.equal(result.step_map, expected[1])
    assert result.calls == expected[2]
    torch.testing.assert_close(result.entropies, expected[3], rtol=1e-4, atol=1e-5)
    assert not (result.tokens == MASK).any()
    assert torch.equal(result.step_map == -1, before != MASK)


def test_llada_schedule(model):
    # 10 masks in 4 steps: the first two write one more.
    tokens = torch.full((1, 10), MASK)
    result = generate(model, tokens, mask_id=MASK, rule=TopK(1), steps=4)
    assert torch.bincount(result.step_map[0]).tolist() == [3, 3, 2, 2]
    assert result.calls == 4


def test_one_token_per_call_and_all_at_once(model):
    tokens = torch.full((2, 6), MASK)
    tokens[1, 3:] = 1
    slow = generate(model, tokens, mask_id=MASK, rule=EntropyThreshold(0.0))
    assert slow.calls == 6
    assert sorted(slow.step_map[0].tolist()) == list(range(6))
    fast = generate(model, tokens, mask_id=MASK, rule=EntropyThreshold(1e9))
    assert fast.calls == 1
    none = generate(model, torch.zeros(2, 3, dtype=torch.int64), mask_id=MASK, rule=TopK(1))
    assert none.calls == 0
    empty = generate(model, torch.zeros(0, 3, dtype=torch.int64), mask_id=MASK, rule=TopK(1))
    assert empty.tokens.shape == (0, 3)
    assert (
        generate(model, torch.zeros(2, 0, dtype=torch.int64), mask_id=MASK, rule=TopK(1)).calls == 0
    )


def test_noise_is_fresh_at_every_step_and_keyed_by_the_seed():
    def flat(tokens):
        return torch.zeros(*tokens.shape, 1000)

    tokens = torch.full((2, 12), 999)
    options = {"mask_id": 999, "rule": TopK(1, score="random"), "seed": 5}
    first = generate(flat, tokens, **options)
    assert torch.equal(first.tokens, generate(flat, tokens, **options).tokens)
    assert torch.equal(first.step_map, generate(flat, tokens, **options).step_map)
    other = generate(flat, tokens, **{**options, "seed": 6})
    assert not torch.equal(first.tokens, other.tokens)
    assert not torch.equal(first.step_map, other.step_map)
    assert not torch.equal(first.step_map[0], first.step_map[1])
    # A position keeps its row key, so equal tokens all over would mean stale noise.
    assert first.tokens.unique().numel() > 18
    sequential = generate(
        flat, torch.full((200, 2), 999), mask_id=999, rule=EntropyThreshold(0.0), seed=1
    ).tokens
    steps_agree = (sequential[:, 0] == sequential[:, 1]).float().mean()
    assert steps_agree < 0.05


def test_answer_early_exit():
    """Row 0 becomes sure of its answer once position 1 is known; row 1 never does."""
    answer = torch.tensor([False, False, False, False, True, True])

    def model(tokens):
        logits = torch.zeros(2, 6, 10)
        logits[:, :4, 2] = 3.0
        sure = (tokens[0, 1] != 9).float() * 20.0
        logits[0, 4, 7] = logits[0, 5, 8] = sure
        return SimpleNamespace(logits=logits)

    tokens = torch.full((2, 6), 9)
    result = generate(
        model,
        tokens,
        mask_id=9,
        rule=EntropyThreshold(0.0),
        block_length=4,
        stop=AnswerEntropy(answer, gamma=0.1),
    )
    assert result.tokens[0].tolist() == [2, 2, 9, 9, 7, 8]
    assert result.step_map[0].tolist() == [0, 1, -1, -1, 2, 2]
    assert (result.tokens[1] != 9).all()
    assert result.entropies[0, 4:].sum() < 0.1
    assert result.calls == 6
    with pytest.raises(ValueError, match=r"stop.positions: expected \(2, 6\) or \(6,\) bool"):
        generate(model, tokens, mask_id=9, rule=TopK(1), stop=AnswerEntropy(torch.ones(5), 0.1))


def test_broken_rows_are_left_alone_and_reported():
    logits = torch.zeros(2, 3, 5)
    logits[0] = float("nan")
    tokens = torch.full((2, 3), 4)
    result = unmask_step_(tokens, logits, mask_id=4, rule=TopK(2))
    assert tokens[0].tolist() == [4, 4, 4]
    assert result.count.tolist() == [0, 2]
    with pytest.raises(RuntimeError, match="model: at step 0 every masked position of row 0"):
        generate(lambda _: logits, torch.full((2, 3), 4), mask_id=4, rule=TopK(2))
    # One good position is enough to go on, and the broken one is never written.
    logits[0, 1] = 0.0
    tokens = torch.full((2, 3), 4)
    assert unmask_step_(tokens, logits, mask_id=4, rule=TopK(3, score="random")).count[0] == 1
    assert tokens[0].tolist() == [4, 0, 4]


def test_mask_id_is_never_written(model):
    tokens = prompt()
    result = generate(model, tokens, mask_id=MASK, rule=TopK(3), seed=2, temperature=3.0)
    assert (result.tokens != MASK).all()
    outside = torch.full((1, 4), -1)
    result = unmask_step_(outside, torch.zeros(1, 4, 7), mask_id=-1, rule=TopK(4))
    assert outside.tolist() == [[0, 0, 0, 0]]
    assert result.count.tolist() == [4]


def test_step_narrowed_by_mask_and_int32():
    tokens = torch.full((1, 4), 6, dtype=torch.int32)
    logits = torch.randn(1, 4, 7)
    allowed = torch.tensor([[False, True, True, False]])
    result = unmask_step_(tokens, logits, mask_id=6, rule=TopK(4), mask=allowed)
    assert torch.equal(result.transfer, allowed)
    assert tokens.dtype == torch.int32
    assert tokens[0, 0] == tokens[0, 3] == 6


def test_compiled_step(model):
    tokens = prompt()
    logits = model(tokens)
    expected = tokens.clone()
    unmask_step_(expected, logits, mask_id=MASK, rule=EntropyThreshold(0.5))

    def step(tokens, logits):
        return unmask_step_(tokens, logits, mask_id=MASK, rule=EntropyThreshold(0.5)).count

    torch.compile(step, fullgraph=True)(tokens, logits)
    assert torch.equal(tokens, expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": torch.zeros(3, dtype=torch.int64)}, r"tokens: expected \(B, L\)"),
        ({"tokens": torch.zeros(1, 3)}, r"tokens: .*torch\.float32"),
        ({"block_length": 0}, "block_length: expected None or at least 1, got 0"),
        ({"steps": 0}, "steps: expected None or at least 1, got 0"),
        ({"mask": torch.ones(1, 3, dtype=torch.bool)}, "mask: belongs to one step"),
        ({"rule": None}, "rule: expected EntropyThreshold"),
        ({"model": lambda tokens: torch.zeros(1, 2, 5)}, r"logits: expected \(B, L, V\)"),
    ],
)
def test_errors_name_the_argument(options, message):
    arguments = {
        "model": lambda tokens: torch.zeros(*tokens.shape, 5),
        "tokens": torch.full((1, 3), 4),
        "mask_id": 4,
        "rule": TopK(1),
        **options,
    }
    with pytest.raises(ValueError, match=message):
        generate(arguments.pop("model"), arguments.pop("tokens"), **arguments)
