"""A checkpoint in the layout that the paper's authors released computes the same here."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import released_cat
from torch_winnow.attention import cat_attention
from torch_winnow.models import load_released_cat

HEADS = {"heads": 4, "compressor_heads": 2}
CASES = {"fixed": (False, (8,)), "adaptive": (True, (1, 2, 4, 8))}


def checkpoint(adaptive: bool, length: int = 64):
    return released_cat.parameters(
        width=32,
        heads=4,
        kv_heads=2,
        depth=2,
        compressor_width=16,
        chunk_size=8,
        length=length,
        vocab=50,
        adaptive=adaptive,
    )


def cases():
    return [
        pytest.param(adaptive, size, id=f"{name}-{size}")
        for name, (adaptive, sizes) in CASES.items()
        for size in sizes
    ]


@torch.no_grad()
@pytest.mark.parametrize(("adaptive", "chunk_size"), cases())
def test_replacing_the_attention_call_keeps_the_logits(adaptive, chunk_size):
    state, tokens = checkpoint(adaptive), torch.randint(50, (3, 48))
    expected = released_cat.forward(state, tokens, chunk_size=chunk_size, **HEADS)
    assert expected.std() > 0.1
    replaced = released_cat.forward(
        state, tokens, chunk_size=chunk_size, attend=cat_attention, **HEADS
    )
    torch.testing.assert_close(replaced, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize(("adaptive", "chunk_size"), cases())
def test_the_loaded_model_has_the_same_logits(adaptive, chunk_size):
    state, tokens = checkpoint(adaptive), torch.randint(50, (3, 48))
    model = load_released_cat(state, **HEADS)
    expected = released_cat.forward(state, tokens, chunk_size=chunk_size, **HEADS)
    # Ours has the first token's distribution too; one more token asks for the last one's.
    logits = model(F.pad(tokens, (0, 1)), chunk_size=chunk_size)[:, 1:]
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize(("adaptive", "chunk_size"), cases())
def test_the_loaded_model_generates_what_the_released_one_would(adaptive, chunk_size):
    state, tokens = checkpoint(adaptive), torch.randint(50, (2, 16))
    model = load_released_cat(state, **HEADS)
    continued = torch.cat(
        (tokens, model.generate(tokens, 24, chunk_size=chunk_size, temperature=0)), 1
    )
    logits = released_cat.forward(state, continued, chunk_size=chunk_size, **HEADS)
    assert torch.equal(continued[:, 16:], logits[:, 15:-1].argmax(-1))


def test_the_dtype_is_kept():
    state = {name: value.bfloat16() for name, value in checkpoint(True).items()}
    assert load_released_cat(state, **HEADS).embedding.weight.dtype == torch.bfloat16


def test_what_does_not_fit_is_named():
    state = checkpoint(True)
    with pytest.raises(ValueError, match="heads: expected a divisor of width=32"):
        load_released_cat(state, heads=5, compressor_heads=2)
    without = {name: value for name, value in state.items() if name != "f.proj_fx.weight"}
    with pytest.raises(ValueError, match=r"state: .* which has 'f.proj_fx.weight'"):
        load_released_cat(without, **HEADS)
    with pytest.raises(ValueError, match=r"state: .* 'layers.0.bias'"):
        load_released_cat({**state, "layers.0.bias": torch.zeros(3)}, **HEADS)
    with pytest.raises(ValueError, match="state: does not fit"):
        load_released_cat({**state, "output.weight": torch.zeros(50, 7)}, **HEADS)
