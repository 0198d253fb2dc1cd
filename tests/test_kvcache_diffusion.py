"""The caches of docs/kvcache/diffusion.md against models that compute every position."""

from __future__ import annotations

import doctest
from pathlib import Path

import pytest
import torch

from torch_winnow.models import MaskedDiffusion, MaskedDiffusionConfig, StackConfig
from torch_winnow.unmasking import ConfidenceThreshold, TopK, generate

PAGE = Path(__file__).parents[1] / "docs/kvcache/diffusion.md"
POLICIES = ("everything", "prefix_cache", "dual_cache", "delayed", "adaptive")


@pytest.fixture(scope="module")
def page() -> dict[str, object]:
    """What the page defines."""
    names: dict[str, object] = {}
    for example in doctest.DocTestParser().get_examples(PAGE.read_text()):
        if example.source.startswith(("import", "from", "class", "def")):
            exec(example.source, names)
    names["adaptive"] = names["adaptive"](masked=4, known=4)
    return names


def make(depth: int) -> MaskedDiffusion:
    stack = StackConfig(width=32, depth=depth, heads=4, kv_heads=2)
    model = MaskedDiffusion(MaskedDiffusionConfig(stack, vocab_size=40)).eval().double()
    torch.manual_seed(depth)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.requires_grad_(False)


def prompts() -> torch.Tensor:
    """Three rows of 37 positions that are given to different lengths."""
    tokens = torch.randint(40, (3, 37), generator=torch.Generator().manual_seed(0))
    for row, given in enumerate((5, 12, 9)):
        tokens[row, given:] = 40
    return tokens


def decode(model, rule, *, context=True, block_length=8):
    options = {"mask_id": 40, "rule": rule, "block_length": block_length, "context": context}
    return generate(model, prompts(), **options)


RULES = [TopK(1), ConfidenceThreshold(0.2)]


@pytest.mark.parametrize("rule", RULES, ids=["one", "several"])
@pytest.mark.parametrize("depth", [1, 3])
def test_refreshing_everything_is_the_model(page, depth, rule):
    model = make(depth)
    expected = decode(model, rule, context=False).tokens
    cached = page["CachedDiffusion"](model, page["everything"])
    result = decode(cached, rule)
    assert torch.equal(result.tokens, expected)
    assert cached.computed == result.calls * expected.numel()


@pytest.mark.parametrize("rule", RULES, ids=["one", "several"])
@pytest.mark.parametrize("policy", ["prefix_cache", "dual_cache", "delayed"])
def test_a_single_layer_is_exact(page, policy, rule):
    """Its keys depend on their own tokens alone, and every policy computes tokens that changed."""
    model = make(1)
    cached = page["CachedDiffusion"](model, page[policy])
    expected = decode(model, rule, context=False)
    result = decode(cached, rule)
    assert torch.equal(result.tokens, expected.tokens)
    assert cached.computed < result.calls * expected.tokens.numel()


def dense(model, tokens):
    """Logits, and the keys and values of every layer, by the model's own code."""
    seen = []

    def attend(layer, query, key, value):
        seen.append((key, value))
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, enable_gqa=True)

    hidden = model.stack(model.embedding(tokens), slice(0, tokens.shape[1]), attend)
    return model.head(hidden), seen


def stored(cached, layer):
    """Keys and values of one layer, (B, Hkv, L, D)."""
    table, length = cached.cache.block_table.long(), int(cached.cache.seq_lens[0])
    return [
        pages[layer, table].transpose(1, 2).flatten(2, 3)[:, :, :length]
        for pages in (cached.pool.key_pages, cached.pool.value_pages)
    ]


@pytest.mark.parametrize("policy", POLICIES)
def test_what_is_computed_is_right_and_the_rest_untouched(page, policy):
    """Every step: a refreshed row is what attention over the stored keys gives; others keep theirs.

    After a refresh of everything, all of it is the model's.
    """
    model = make(2)
    cached = page["CachedDiffusion"](model, page[policy])
    refreshed, whole = [], []

    def watched(tokens, context):
        before = None if cached.cache is None else [x.clone() for x in stored(cached, 1)]
        logits_before = None if before is None else cached.logits.clone()
        rule = page[policy]
        refresh = torch.ones_like(tokens, dtype=torch.bool)
        if before is not None:
            refresh = rule(cached, tokens, context)
        logits = cached(tokens, context)
        refreshed.append(refresh.sum())
        # A row with fewer than others repeats its first position, or computes position 0.
        refresh[:, 0] |= ~refresh.any(1)
        full = refresh.all(1)
        if full.any():
            whole.append(1)
            expected, states = dense(model, tokens[full])
            torch.testing.assert_close(logits[full], expected)
            for layer, (key, value) in enumerate(states):
                keys, values = stored(cached, layer)
                torch.testing.assert_close(keys[full], key)
                torch.testing.assert_close(values[full], value)
        if before is not None:
            for now, then in zip(stored(cached, 1), before, strict=True):
                assert torch.equal(
                    now.mT[~refresh[:, None, None].expand_as(now.mT)],
                    then.mT[~refresh[:, None, None].expand_as(then.mT)],
                )
            assert torch.equal(logits[~refresh], logits_before[~refresh])
        # Keys of the first layer are those of the tokens wherever they were computed since.
        key, value = dense(model, tokens)[1][0]
        torch.testing.assert_close(stored(cached, 0)[0], key)
        torch.testing.assert_close(stored(cached, 0)[1], value)
        return logits

    result = decode(watched, TopK(1))
    assert (result.tokens != 40).all()
    assert len(refreshed) == result.calls
    blocks = 4  # of the row with the fewest
    if policy in ("prefix_cache", "dual_cache"):
        assert len(whole) >= blocks


def test_adaptive_refreshes_what_it_says(page):
    model = make(2)
    cached = page["CachedDiffusion"](model, page["adaptive"])
    counts = []

    def watched(tokens, context):
        before = int(cached.computed)
        logits = cached(tokens, context)
        counts.append(int(cached.computed) - before)
        return logits

    decode(watched, TopK(1), block_length=37)
    assert counts[0] == 3 * 37
    # Four of each kind in each row, and up to one that changed.
    assert all(count <= 3 * 9 for count in counts[1:])
    assert counts[1] >= 3 * 8
    mass = cached.mass
    assert mass.shape == (3, 37)
    assert bool((mass >= 0).all())
