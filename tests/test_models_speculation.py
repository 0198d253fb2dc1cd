"""Speculative generation: whatever the draft, the tokens are the target's."""

from __future__ import annotations

import itertools

import pytest
import torch

from test_models import loud
from torch_winnow.models import (
    CATConfig,
    CompressAttendTransformer,
    DenseConfig,
    DenseDecoder,
    StackConfig,
    sample,
    speculative_sample,
)

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = StackConfig(width=16, depth=1, heads=2)


def started(model, prompt, total, draft_tokens, *, chunk_size=None, lengths=None):
    options = {} if chunk_size is None else {"chunk_size": chunk_size}
    pool = model.block_pool(len(prompt), total, draft_tokens=draft_tokens, **options)
    return model.start(prompt, pool, lengths=lengths, **options)


@pytest.mark.parametrize("draft_tokens", [1, 3, 9])
@pytest.mark.parametrize(("target_size", "draft_size"), [(2, 8), (4, 8), (8, 2), (4, 4)])
def test_greedy_tokens_are_the_targets(target_size, draft_size, draft_tokens):
    model = loud(CompressAttendTransformer(CATConfig(SMALL, SMALL, (2, 4, 8), max_tokens=64)))
    prompt, lengths = torch.randint(256, (4, 17)), [0, 9, 16, 17]
    target, draft = (
        started(model, prompt, 57, draft_tokens, chunk_size=size, lengths=lengths)
        for size in (target_size, draft_size)
    )
    result = speculative_sample(target, draft, 40, draft_tokens=draft_tokens, temperature=0)
    expected = model.generate(prompt, 40, chunk_size=target_size, lengths=lengths, temperature=0)
    assert torch.equal(result.tokens, expected)
    # Both hold all tokens but the last, and go on.
    assert target.lengths.tolist() == draft.lengths.tolist() == [n + 39 for n in lengths]
    assert result.tokens.shape == (4, 40)
    assert (result.accepted <= result.drafted).all()
    alone = model.generate(
        prompt,
        40,
        chunk_size=target_size,
        lengths=lengths,
        temperature=0,
        draft_chunk_size=draft_size,
        draft_tokens=draft_tokens,
    )
    assert torch.equal(alone, expected)
    if target_size == draft_size:  # a draft that is the target is never wrong
        assert torch.equal(result.accepted, result.drafted)
        assert result.calls == -(-39 // (draft_tokens + 1))


def test_any_decoder_drafts_for_any_other():
    cat = loud(CompressAttendTransformer(CATConfig(SMALL, SMALL, (4,), max_tokens=64)))
    dense = loud(DenseDecoder(DenseConfig(SMALL, max_tokens=64)))
    prompt = torch.randint(256, (2, 5))
    for first, second in itertools.permutations([(cat, 4), (dense, None)]):
        target, draft = (
            started(model, prompt, 64, 5, chunk_size=size) for model, size in (first, second)
        )
        result = speculative_sample(target, draft, 59, draft_tokens=5, temperature=0)
        alone = sample(started(first[0], prompt, 64, 0, chunk_size=first[1]), 59, temperature=0)
        assert torch.equal(result.tokens, alone)


def test_drawn_tokens_are_distributed_as_the_targets():
    """All texts of three tokens over three ids: chi-square against their exact probabilities."""
    model = loud(
        CompressAttendTransformer(CATConfig(SMALL, SMALL, (1, 2), vocab_size=3, max_tokens=5)), 0.5
    )
    count, temperature = 6000, 0.8
    prompt = torch.tensor([[1, 2]]).expand(count, 2)
    target, draft = (started(model, prompt, 5, 2, chunk_size=size) for size in (1, 2))
    generator = torch.Generator().manual_seed(3)
    result = speculative_sample(
        target, draft, 3, draft_tokens=2, temperature=temperature, generator=generator
    )
    assert 0.2 < (result.accepted.sum() / result.drafted.sum()) < 0.95  # both ways are taken

    texts = torch.tensor(list(itertools.product(range(3), repeat=3)))
    whole = torch.cat((torch.tensor([[1, 2]]).expand(27, 2), texts), dim=1)
    with torch.no_grad():
        log_prob = (model(whole, chunk_size=1) / temperature).log_softmax(-1)
    expected = log_prob[:, 2:].gather(2, texts[:, :, None]).sum((1, 2)).exp() * count
    assert abs(expected.sum() - count) < 1e-2
    seen = (result.tokens @ torch.tensor([9, 3, 1])).bincount(minlength=27)
    # Rare texts together, so that the statistic is a chi-square's.
    rare = expected < 5
    expected = torch.cat((expected[~rare], expected[rare].sum()[None]))
    seen = torch.cat((seen[~rare], seen[rare].sum()[None]))
    statistic = ((seen - expected).square() / expected.clamp(min=1e-6)).sum()
    freedom = len(expected) - 1
    # Six standard deviations of the statistic; with the draft's own law it is beyond a hundred.
    assert statistic < freedom + 6 * (2 * freedom) ** 0.5


def test_nothing_to_draw():
    model = loud(CompressAttendTransformer(CATConfig(SMALL, SMALL, (2, 4), max_tokens=8)))
    for batch, count in [(0, 5), (2, 0), (2, 1)]:
        prompt = torch.zeros((batch, 3), dtype=torch.int64)
        target, draft = (started(model, prompt, 8, 4, chunk_size=size) for size in (2, 4))
        result = speculative_sample(target, draft, count)
        assert result.tokens.shape == (batch, count)
        assert result.calls == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_tokens": -1}, "num_tokens: expected at least 0, got -1"),
        ({"draft_tokens": 0}, "draft_tokens: expected at least 1, got 0"),
        ({"temperature": float("nan")}, "temperature: expected a finite number"),
        ({"lengths": [2, 3]}, r"draft: expected the target's sequences, of \[3, 3\] tokens"),
    ],
)
def test_errors_name_the_argument(options, message):
    model = loud(CompressAttendTransformer(CATConfig(SMALL, SMALL, (2, 4), max_tokens=8)))
    prompt = torch.zeros((2, 3), dtype=torch.int64)
    target = started(model, prompt, 8, 4, chunk_size=2)
    draft = started(model, prompt, 8, 4, chunk_size=4, lengths=options.pop("lengths", None))
    arguments = {"num_tokens": 3, **options}
    with pytest.raises(ValueError, match=message):
        speculative_sample(target, draft, arguments.pop("num_tokens"), **arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chunk_size": 0}, r"chunk_size: expected one of \(2, 4\), got 0"),
        ({"draft_chunk_size": 3}, r"draft_chunk_size: expected one of \(2, 4\), got 3"),
        ({"draft_tokens": -3}, "draft_tokens: expected at least 1, got -3"),
    ],
)
def test_errors_of_generate_name_the_argument(options, message):
    model = loud(CompressAttendTransformer(CATConfig(SMALL, SMALL, (2, 4), max_tokens=8)))
    arguments = {"chunk_size": 2, "draft_chunk_size": 4, **options}
    with pytest.raises(ValueError, match=message):
        model.generate(torch.zeros((2, 3), dtype=torch.int64), 3, **arguments)
