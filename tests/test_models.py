"""The models: what a token may see, and that generating equals the parallel forward."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from torch_winnow.models import (
    CATConfig,
    CompressAttendTransformer,
    DenseConfig,
    DenseDecoder,
    MaskedDiffusion,
    MaskedDiffusionConfig,
    StackConfig,
    sample,
)

pytestmark = pytest.mark.usefixtures("one_thread")

CHUNK_SIZES = (1, 2, 4, 7, 16)
LENGTH = 45  # several chunks of every size but the last, and a partial one at the end
GROUPED = StackConfig(width=32, depth=2, heads=4, kv_heads=2)
SMALL = StackConfig(width=16, depth=2, heads=2)


def loud(model, std=0.3):
    """Weights so large that every connection shows: at the start layers are the identity."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data.normal_(std=std, generator=generator)
    return model.eval()


LAYOUTS = {
    "separator": {"separator": True},
    "no separator": {"separator": False},
    "sequence positions": {"positions": "sequence"},
}


@pytest.fixture(scope="module", params=LAYOUTS)
def cat(request):
    config = CATConfig(GROUPED, SMALL, CHUNK_SIZES, max_tokens=64, **LAYOUTS[request.param])
    return loud(CompressAttendTransformer(config))


@pytest.fixture(scope="module")
def dense():
    return loud(DenseDecoder(DenseConfig(GROUPED, max_tokens=64)))


@pytest.fixture(scope="module")
def diffusion():
    return loud(MaskedDiffusion(MaskedDiffusionConfig(GROUPED, max_tokens=64)))


@pytest.fixture
def tokens():
    return torch.randint(256, (3, LENGTH))


def seen_by(model, tokens, **options):
    """``(N, N)`` bool: whether the logits of token i change with token j.

    In float64, where a change through the faintest connection stands far above rounding.
    """
    model = copy.deepcopy(model).double()
    before = model(tokens, **options)
    assert before.isfinite().all()
    changed = tokens.repeat(LENGTH, 1)
    changed.diagonal().add_(1).remainder_(256)
    return ((model(changed, **options) - before).abs().amax(-1) > 1e-10).T


@torch.no_grad()
@pytest.mark.parametrize("chunk_size", CHUNK_SIZES)
def test_cat_sees_the_past_and_nothing_else(cat, tokens, chunk_size):
    seen = seen_by(cat, tokens[:1], chunk_size=chunk_size)
    expected = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril(-1)
    assert torch.equal(seen, expected)


@torch.no_grad()
def test_dense_sees_the_past_and_nothing_else(dense, tokens):
    assert torch.equal(
        seen_by(dense, tokens[:1]), torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril(-1)
    )


@torch.no_grad()
def test_diffusion_sees_both_sides(diffusion, tokens):
    assert seen_by(diffusion, tokens[:1]).all()


@torch.no_grad()
@pytest.mark.parametrize("chunk_size", CHUNK_SIZES)
def test_a_chunk_is_seen_through_its_vector_alone(cat, tokens, chunk_size):
    """With the compressor silenced, earlier chunks are out of sight."""
    silenced = copy.deepcopy(cat)
    silenced.compressor.projection.weight.zero_()
    seen = seen_by(silenced, tokens[:1], chunk_size=chunk_size)
    chunk = torch.arange(LENGTH) // chunk_size
    within = chunk[:, None] == chunk[None, :]
    assert torch.equal(seen, within.tril(-1))


@pytest.mark.parametrize("chunk_size", CHUNK_SIZES)
@pytest.mark.parametrize("given", [0, 1, 7, 16, 33])
def test_cat_generates_what_the_parallel_forward_says(cat, tokens, chunk_size, given):
    pool = cat.block_pool(3, LENGTH, chunk_size=chunk_size)
    with torch.no_grad():
        expected = cat(tokens, chunk_size=chunk_size)
    decoding = cat.start(tokens[:, :given], pool, chunk_size=chunk_size)
    for position in range(given, LENGTH):
        torch.testing.assert_close(decoding.logits, expected[:, position], rtol=1e-4, atol=1e-4)
        assert int(decoding.cache.seq_lens.max()) <= cat.cache_rows(LENGTH, chunk_size)
        decoding.step(tokens[:, position])


@pytest.mark.parametrize("given", [0, 1, 33])
def test_dense_generates_what_the_parallel_forward_says(dense, tokens, given):
    with torch.no_grad():
        expected = dense(tokens)
    decoding = dense.start(tokens[:, :given], dense.block_pool(3, LENGTH + 1))
    for position in range(given, LENGTH):
        torch.testing.assert_close(decoding.logits, expected[:, position], rtol=1e-4, atol=1e-4)
        decoding.step(tokens[:, position])


@pytest.mark.parametrize("chunk_size", [*CHUNK_SIZES, None])
def test_sequences_of_different_lengths_go_on_together(cat, dense, tokens, chunk_size):
    """Rows at every phase of their chunk, some turning it while others do not."""
    model = cat if chunk_size else dense
    option = {"chunk_size": chunk_size} if chunk_size else {}
    rows = torch.arange(3).repeat(6)
    text, lengths = tokens[rows], torch.arange(18)
    with torch.no_grad():
        expected = model(text, **option)
    pool = model.block_pool(18, LENGTH, **option)
    decoding = model.start(text[:, :20], pool, lengths=lengths, **option)
    for step in range(20):
        here = lengths + step
        assert torch.equal(decoding.lengths, here)
        torch.testing.assert_close(
            decoding.logits, expected[torch.arange(18), here], rtol=1e-4, atol=1e-4
        )
        decoding.step(text[torch.arange(18), here])
        if step == 9:  # lengths move with their sequences
            order = torch.randperm(18)
            decoding.permute_(order)
            text, expected, lengths = text[order], expected[order], lengths[order]


@pytest.mark.parametrize("chunk_size", [4, None])
def test_forked_and_permuted_sequences_go_on_alone(cat, dense, tokens, chunk_size):
    model = cat if chunk_size else dense
    option = {"chunk_size": chunk_size} if chunk_size else {}
    parents, ancestors = torch.tensor([0, 0, 2, 1]), torch.tensor([1, 1, 3, 0])
    pool = model.block_pool(3, LENGTH, spare_blocks=8, **option)
    decoding = model.start(tokens[:, :10], pool, **option)
    text = tokens[:, :10]
    for step in range(12):  # the chunk turns before, between and after
        if step == 2:
            decoding.fork_(parents)
            text = text[parents]
        if step == 5:
            decoding.permute_(ancestors)
            text = text[ancestors]
        token = torch.randint(256, (len(text),))
        text = torch.cat((text, token[:, None]), dim=1)
        decoding.step(token)
    with torch.no_grad():
        expected = model(torch.cat((text, text[:, :1]), dim=1), **option)[:, -1]
    torch.testing.assert_close(decoding.logits, expected, rtol=1e-4, atol=1e-4)


def test_cat_holds_fewer_rows_than_the_dense_decoder(cat, dense, tokens):
    prompt = tokens[:, :40]
    decodings = [cat.start(prompt, cat.block_pool(3, 64, chunk_size=16), chunk_size=16)]
    decodings.append(dense.start(prompt, dense.block_pool(3, 64)))
    held = [int(decoding.cache.seq_lens[0]) for decoding in decodings]
    assert held == [3 + cat.config.leading_rows - 1 + 8, 41]
    assert all(decoding.cache_bytes > 0 for decoding in decodings)


def test_sampling_is_reproducible_and_greedy_at_zero_temperature(cat, tokens):
    drawn = [
        cat.generate(tokens, 9, chunk_size=4, generator=torch.Generator().manual_seed(seed))
        for seed in (0, 0, 1)
    ]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    greedy = cat.generate(tokens, 3, chunk_size=4, temperature=0)
    with torch.no_grad():
        logits = cat(torch.cat((tokens, greedy), dim=1), chunk_size=4)
    assert torch.equal(logits[:, LENGTH:].argmax(-1), greedy)
    assert cat.generate(tokens, 0, chunk_size=4).shape == (3, 0)


def test_no_tokens_and_no_sequences(cat, dense):
    nothing = torch.zeros((2, 0), dtype=torch.int64)
    assert cat(nothing, chunk_size=4).shape == (2, 0, 256)
    assert dense(nothing).shape == (2, 0, 256)
    nobody = torch.zeros((0, 9), dtype=torch.int64)
    assert cat(nobody, chunk_size=4).shape == (0, 9, 256)
    assert dense(nobody).shape == (0, 9, 256)


@pytest.mark.parametrize("chunk_size", CHUNK_SIZES)
def test_every_weight_learns(cat, tokens, chunk_size):
    cat.zero_grad()
    cat(tokens, chunk_size=chunk_size).float().logsumexp(-1).sum().backward()
    # The only token of a chunk of one is seen through its vector.
    idle = {"embedding.weight"} if chunk_size == 1 else set()
    for name, parameter in cat.named_parameters():
        silent = parameter.grad is None or not parameter.grad.any()
        assert silent == (name in idle), name
        assert silent or parameter.grad.isfinite().all(), name


def test_diffusion_loss_is_the_bound(diffusion):
    """For logits that ignore the input, the bound is the cross-entropy itself, in expectation."""
    torch.nn.init.zeros_(diffusion.head.weight)
    tokens = torch.randint(256, (64, 48))
    generator = torch.Generator().manual_seed(0)
    losses = torch.stack([diffusion.loss(tokens, generator=generator) for _ in range(40)])
    # 40 estimates; five standard errors make a false alarm rarer than one in a million.
    error = losses.std() / 40**0.5
    assert abs(losses.mean() - math.log(256)) < 5 * error
    assert error < 0.1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, x: m(x, chunk_size=3), r"chunk_size: expected one of .* got 3"),
        (lambda m, x: m(x[0], chunk_size=4), r"tokens: expected \(B, N\)"),
        (lambda m, x: m(x.float(), chunk_size=4), r"tokens: .*float32"),
        (lambda m, x: m(x + 256, chunk_size=4), r"tokens: expected ids in \[0, 256\)"),
        (lambda m, x: m(x.repeat(1, 2), chunk_size=4), r"tokens: expected at most max_tokens=64"),
        (lambda m, x: m.start(x, None, chunk_size=5), r"chunk_size: expected one of"),
        (lambda m, x: m.generate(x, -1, chunk_size=4), r"num_tokens: expected at least 0.*got -1"),
        (
            lambda m, x: m.generate(x, 1, chunk_size=4, temperature=-1),
            r"temperature: expected a finite number",
        ),
        (
            lambda m, x: m.generate(x, 1, chunk_size=4, lengths=[1, 2, 46]),
            r"lengths: expected 0 to 45, .* got \[1, 2, 46\]",
        ),
        (
            lambda m, x: m.generate(x, 1, chunk_size=4, lengths=[1.0, 2.0, 3.0]),
            r"lengths: expected \(3,\) integers.*float32",
        ),
        (lambda m, x: m.generate(x, 20, chunk_size=4), r"num_tokens: .*max_tokens=64.*got 20"),
    ],
)
def test_errors_name_the_argument(cat, tokens, call, message):
    with pytest.raises(ValueError, match=message):
        call(cat, tokens)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: StackConfig(width=30, depth=1, heads=4), "heads: expected a divisor"),
        (lambda: StackConfig(width=12, depth=1, heads=4), "even head dimension"),
        (lambda: StackConfig(width=32, depth=1, heads=4, kv_heads=3), "kv_heads: expected"),
        (lambda: StackConfig(width=32, depth=0, heads=4), "depth: expected at least 1"),
        (lambda: CATConfig(chunk_sizes=4), "chunk_sizes: expected distinct positive sizes, got 4"),
        (lambda: CATConfig(chunk_sizes=()), "chunk_sizes: expected distinct positive"),
        (lambda: CATConfig(chunk_sizes=(4, 4)), "chunk_sizes: expected distinct positive"),
        (lambda: CATConfig(positions="rows"), "positions: expected .* got 'rows'"),
        (lambda: CATConfig(projection="first"), "projection: expected .* got 'first'"),
    ],
)
def test_bad_configurations_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("name", ["dense", "diffusion"])
def test_a_text_beyond_the_last_position_is_refused(request, name, tokens):
    model = request.getfixturevalue(name)
    with pytest.raises(ValueError, match="tokens: expected at most max_tokens=64, got 90"):
        model(tokens.repeat(1, 2))


@pytest.mark.parametrize("most", [0.0, 1.5, math.nan])
def test_a_share_to_hide_is_a_share(diffusion, tokens, most):
    with pytest.raises(ValueError, match=rf"most: expected a share in \(0, 1\], got {most}"):
        diffusion.loss(tokens, most=most)


def test_sample_continues_where_it_stopped(dense, tokens):
    decoding = dense.start(tokens, dense.block_pool(3, 64))
    first = sample(decoding, 4, temperature=0)
    decoding.step(first[:, -1])
    second = sample(decoding, 3, temperature=0)
    whole = dense.generate(tokens, 7, temperature=0)
    assert torch.equal(torch.cat((first, second), dim=1), whole)
