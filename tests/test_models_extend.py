"""Several tokens in one pass: the same as one at a time, and what is taken back leaves no trace."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from test_models import loud
from torch_winnow.kvcache import BlockPool, BlockPoolExhausted
from torch_winnow.models import (
    CATConfig,
    CompressAttendTransformer,
    DenseConfig,
    DenseDecoder,
    StackConfig,
)

pytestmark = pytest.mark.usefixtures("one_thread")

CHUNK_SIZES = (1, 2, 4, 7, 16)
LENGTH = 60
BATCH = 5
GROUPED = StackConfig(width=16, depth=2, heads=4, kv_heads=2)
SMALL = StackConfig(width=8, depth=1, heads=2)
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def cat_with(**layout):
    config = CATConfig(GROUPED, SMALL, CHUNK_SIZES, vocab_size=50, max_tokens=LENGTH, **layout)
    return loud(CompressAttendTransformer(config))


MODELS = {
    "separator": cat_with(),
    "no separator": cat_with(separator=False),
    "sequence positions": cat_with(positions="sequence"),
    "dense": loud(DenseDecoder(DenseConfig(GROUPED, vocab_size=50, max_tokens=LENGTH))),
}
CASES = [(name, size) for name in MODELS for size in CHUNK_SIZES if name != "dense"]
CASES += [("dense", None)]
TOKENS = torch.randint(50, (BATCH, LENGTH), generator=torch.Generator().manual_seed(2))


def started(name, chunk_size, lengths, *, draft_tokens, spare_blocks=0):
    model = MODELS[name]
    options = {} if chunk_size is None else {"chunk_size": chunk_size}
    pool = model.block_pool(
        len(lengths), LENGTH, draft_tokens=draft_tokens, spare_blocks=spare_blocks, **options
    )
    prompt = TOKENS[: len(lengths), : max(lengths, default=0)]
    return model.start(prompt, pool, lengths=lengths, **options)


def expected_logits(name, chunk_size):
    options = {} if chunk_size is None else {"chunk_size": chunk_size}
    with torch.no_grad():
        return MODELS[name](TOKENS, **options)


@pytest.mark.parametrize("draft_tokens", [1, 3, 20])
@pytest.mark.parametrize(("name", "chunk_size"), CASES)
def test_extending_is_stepping(name, chunk_size, draft_tokens):
    """Rows at different places of their chunks, some passing several ends in one pass."""
    lengths = [0, 3, 7, 8, 15]
    expected = expected_logits(name, chunk_size)
    decoding = started(name, chunk_size, lengths, draft_tokens=draft_tokens)
    rows, here = torch.arange(BATCH), torch.tensor(lengths)
    for _ in range(2 if draft_tokens == 20 else 5):
        index = here[:, None] + torch.arange(draft_tokens)
        logits = decoding.extend(TOKENS.gather(1, index))
        torch.testing.assert_close(logits, expected[rows[:, None], index + 1], **CLOSE)
        here = here + draft_tokens
        assert torch.equal(decoding.lengths, here)
        assert torch.equal(decoding.logits, logits[:, -1])
        decoding.step(TOKENS[rows, here])  # the cache is as after steps
        here = here + 1
        torch.testing.assert_close(decoding.logits, expected[rows, here], **CLOSE)


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_what_is_taken_back_leaves_no_trace(data):
    """Any mix of steps, extensions of any raggedness, rollbacks, permutations and forks."""
    name, chunk_size = data.draw(st.sampled_from(CASES))
    batch = data.draw(st.integers(1, BATCH))
    lengths = data.draw(st.lists(st.integers(0, 20), min_size=batch, max_size=batch))
    decoding = started(name, chunk_size, lengths, draft_tokens=12)
    text, expected = TOKENS[:batch], expected_logits(name, chunk_size)[:batch]
    rows = torch.arange(batch)

    def check():
        torch.testing.assert_close(decoding.logits, expected[rows, decoding.lengths], **CLOSE)

    for _ in range(data.draw(st.integers(1, 8))):
        room = LENGTH - 1 - int(decoding.lengths.max())
        action = data.draw(st.sampled_from(["step", "extend", "extend", "permute", "fork"]))
        if action == "step" and room:
            decoding.step(text[rows, decoding.lengths])
        elif action == "extend":
            longest = data.draw(st.integers(0, min(12, room)))
            counts = [data.draw(st.integers(0, longest)) for _ in range(batch)]
            before = decoding.lengths
            index = before[:, None] + torch.arange(longest)
            own = torch.arange(longest) < torch.tensor(counts)[:, None]
            logits = decoding.extend(torch.where(own, text.gather(1, index), -1), counts)
            torch.testing.assert_close(
                logits[own], expected[rows[:, None], index + 1][own], **CLOSE
            )
            assert torch.equal(decoding.lengths, before + torch.tensor(counts))
            check()
            if longest:  # rows after the last repeat it
                repeated = expected[rows, decoding.lengths]
                torch.testing.assert_close(logits[:, -1], repeated, **CLOSE)
            if data.draw(st.booleans()):
                kept = [data.draw(st.integers(0, count)) for count in counts]
                decoding.truncate_(before + torch.tensor(kept))
                assert torch.equal(decoding.lengths, before + torch.tensor(kept))
        elif action == "permute":
            order = torch.tensor(data.draw(st.permutations(range(batch))))
            decoding.permute_(order)
            text, expected = text[order], expected[order]
        elif action == "fork":
            # The fork goes its own way and is dropped; the original goes on.
            fork = decoding.fork(range(batch))
            for i in range(min(3, room)):
                fork.step((text[rows, decoding.lengths + i] + 1) % 50)
            del fork
        check()


@pytest.mark.parametrize(("name", "chunk_size"), CASES)
def test_pages_return(name, chunk_size):
    """After the tokens are settled, the pages are those that stepping would hold."""
    stepped, extended = (started(name, chunk_size, [5] * 3, draft_tokens=25) for _ in range(2))
    for position in range(5, 30):
        stepped.step(TOKENS[:3, position])
    extended.extend(TOKENS[:3, 5:30])
    extended.truncate_(extended.lengths)
    free = [decoding.cache.pool.num_free_blocks for decoding in (stepped, extended)]
    assert torch.equal(extended.cache.seq_lens, stepped.cache.seq_lens)
    # A block that was copied for a fork stays copied; nothing else is held.
    assert free[0] - 3 <= free[1] <= free[0]


def test_a_pool_that_runs_out_leaves_the_sequences_as_they_were():
    decoding = started("separator", 4, [9, 10], draft_tokens=0)
    before = decoding.logits.clone(), decoding.lengths.clone()
    assert decoding.cache.pool.num_free_blocks == 0
    with pytest.raises(BlockPoolExhausted):
        decoding.extend(TOKENS[:2, 10:25])
    assert torch.equal(decoding.lengths, before[1])
    assert torch.equal(decoding.logits, before[0])
    expected = expected_logits("separator", 4)
    decoding.step(TOKENS[[0, 1], [9, 10]])
    torch.testing.assert_close(decoding.logits, expected[[0, 1], [10, 11]], **CLOSE)


@pytest.mark.parametrize(("name", "chunk_size"), [("separator", 4), ("dense", None)])
def test_a_step_that_fails_can_be_repeated(name, chunk_size):
    """One sequence turns its chunk; pages that a fork shares would have to be copied."""
    decoding = started(name, chunk_size, [11, 9], draft_tokens=0)
    expected, rows = expected_logits(name, chunk_size), torch.arange(2)
    fork = decoding.fork([0, 1])
    assert decoding.cache.pool.num_free_blocks == 0
    for tokens, error in [(TOKENS[rows, [11, 9]], BlockPoolExhausted), ([3, 50], IndexError)]:
        with pytest.raises(error):
            decoding.step(torch.as_tensor(tokens))
        assert decoding.lengths.tolist() == [11, 9]
        torch.testing.assert_close(decoding.logits, expected[rows, [11, 9]], **CLOSE)
    del fork
    decoding.step(TOKENS[rows, [11, 9]].int())
    torch.testing.assert_close(decoding.logits, expected[rows, [12, 10]], **CLOSE)
    for tokens, message in [
        (torch.zeros(1, dtype=torch.int64), r"tokens: expected \(2,\) integer .*got \(1,\)"),
        (torch.zeros(2, 1, dtype=torch.int64), r"tokens: expected \(2,\) integer"),
        (torch.zeros(2), "tokens: .*float32"),
    ]:
        with pytest.raises(ValueError, match=message):
            decoding.step(tokens)


@pytest.mark.parametrize(("name", "chunk_size"), [("separator", 4), ("dense", None)])
def test_no_sequences(name, chunk_size):
    decoding = started(name, chunk_size, [5, 6], draft_tokens=4)
    decoding.fork_([])
    assert decoding.logits.shape == (0, 50)
    assert decoding.extend(TOKENS[:0, :3], []).shape == (0, 3, 50)
    decoding.truncate_([])
    assert decoding.step(TOKENS[:0, 0]).shape == (0, 50)
    decoding.permute_([])
    assert decoding.fork([]).lengths.tolist() == []


@pytest.mark.parametrize(("name", "chunk_size"), [("separator", 4), ("dense", None)])
def test_errors_name_the_argument(name, chunk_size):
    decoding = started(name, chunk_size, [20, 30], draft_tokens=8)
    pool: BlockPool = decoding.cache.pool
    free = pool.num_free_blocks
    for call, message in [
        (lambda: decoding.extend(TOKENS[:3, :2]), r"tokens: expected \(2, T\) integer"),
        (lambda: decoding.extend(TOKENS[0]), r"tokens: expected \(2, T\) integer"),
        (lambda: decoding.extend(torch.zeros(2, 3)), r"tokens: .*float32"),
        (lambda: decoding.extend(TOKENS[:2, :4], [1, 5]), r"counts: expected 0 to 4.*\[1, 5\]"),
        (lambda: decoding.extend(TOKENS[:2, :4], [1]), r"counts: expected \(2,\) integers"),
        (lambda: decoding.extend(TOKENS[:2, :31]), r"tokens: .* max_tokens=60"),
        (lambda: decoding.truncate_([19, 30]), r"lengths: only what the last extend .*\[19, 30\]"),
        (lambda: decoding.truncate_([20, 31]), r"lengths: only what the last extend"),
        (lambda: decoding.truncate_([20]), r"lengths: expected \(2,\) integers"),
        (lambda: decoding.truncate_([20.0, 30.0]), r"lengths: expected .*float32"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
    assert decoding.lengths.tolist() == [20, 30]
    assert pool.num_free_blocks == free
    decoding.extend(TOKENS[:2, :3])
    decoding.truncate_([22, 30])
    with pytest.raises(ValueError, match="only what the last extend"):
        decoding.truncate_([21, 30])  # once
    decoding.extend(TOKENS[:2, :0])
    assert decoding.lengths.tolist() == [22, 30]
