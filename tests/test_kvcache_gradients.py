"""Caches serve inference: what expects a gradient is refused, whichever argument it is."""

from __future__ import annotations

import pytest
import torch

from torch_winnow.kvcache import (
    BlockPool,
    PagedKVCache,
    block_summaries,
    paged_attention,
    score_blocks,
    select_blocks,
)

TABLE = torch.tensor([[1, 0]], dtype=torch.int32)
LENGTHS = torch.tensor([6], dtype=torch.int32)
FLOATING = {
    "query": lambda: torch.randn(1, 2, 1, 8),
    "key_pages": lambda: torch.randn(3, 1, 4, 8),
    "value_pages": lambda: torch.randn(3, 1, 4, 8),
    "key_bias": lambda: torch.randn(3, 1, 4),
    "summaries": lambda: torch.randn(1, 1, 2, 2, 8),
}
CALLS = {
    "paged_attention": (
        lambda **tensors: paged_attention(**tensors, block_table=TABLE, seq_lens=LENGTHS),
        ("query", "key_pages", "value_pages", "key_bias"),
    ),
    "block_summaries": (
        lambda key_pages: block_summaries(key_pages, TABLE, LENGTHS),
        ["key_pages"],
    ),
    "score_blocks": (score_blocks, ("query", "summaries")),
}


@pytest.mark.parametrize(
    ("call", "argument"),
    [(name, argument) for name, (_, arguments) in CALLS.items() for argument in arguments],
)
def test_every_argument_that_requires_a_gradient_is_refused(call, argument):
    function, names = CALLS[call]
    tensors = {name: FLOATING[name]() for name in names}
    expected = function(**tensors)
    tensors[argument].requires_grad_()
    with pytest.raises(ValueError, match=rf"{argument}: requires a gradient.*no_grad"):
        function(**tensors)
    with torch.no_grad():
        result = function(**tensors)
    assert not result.requires_grad
    assert torch.equal(result, expected)


def test_the_refusal_leaves_no_graph_break():
    function, names = CALLS["paged_attention"]
    tensors = {name: FLOATING[name]() for name in names}
    compiled = torch.compile(function, fullgraph=True)
    torch.testing.assert_close(compiled(**tensors), function(**tensors))


def test_a_choice_has_no_gradient():
    scores = torch.randn(1, 1, 2, requires_grad=True)
    chosen = select_blocks(scores, 2, seq_lens=LENGTHS, block_size=4)
    assert not chosen.requires_grad


@pytest.mark.parametrize("operation", ["append", "write", "copy"])
def test_autograd_sees_that_pages_were_written(operation):
    """A backward pass that saved pages must not run on what they hold now."""
    pool = BlockPool(4, num_layers=1, num_kv_heads=1, head_dim=2, block_size=4, dtype=torch.float32)
    cache = PagedKVCache(pool, 2)
    token = torch.ones(2, 1, 1, 2)
    cache.append(0, token, token)
    if operation == "copy":
        cache.permute_([0, 0])
    weight = torch.ones(2, requires_grad=True)
    loss = (weight * pool.key_pages).sum()
    if operation == "write":
        cache.write(0, token, token, torch.zeros(2, 1, dtype=torch.int64))
    else:
        cache.append(0, token, token)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
