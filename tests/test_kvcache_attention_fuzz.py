"""paged_attention against its definition on whatever shapes and options hypothesis thinks of."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import TOLERANCE, running_on
from test_kvcache_attention import make
from torch_winnow import _library, reference
from torch_winnow.kvcache import paged_attention

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@st.composite
def calls(draw):
    key_heads = draw(st.integers(1, 3))
    block_size = draw(st.sampled_from([1, 2, 5, 16, 64, 70]))
    lengths = draw(st.lists(st.integers(0, 150), max_size=2))
    torch.manual_seed(draw(st.integers(0, 2**31)))
    inputs = make(
        lengths,
        heads=(key_heads * draw(st.integers(1, 5)), key_heads),
        queries=draw(st.integers(0, 12)),
        dim=draw(st.integers(1, 70)),
        value_dim=draw(st.integers(1, 140)),
        block_size=block_size,
        dtype=draw(st.sampled_from(DTYPES)),
    )
    options = {
        "causal": draw(st.booleans()),
        "window": draw(st.none() | st.integers(1, 160)),
        "sinks": draw(st.integers(0, 20)),
        "scale": draw(st.none() | st.floats(-0.3, 0.3)),
    }
    if draw(st.booleans()):
        blocks = inputs[1].shape[0]
        bias = torch.randn(blocks, key_heads, block_size)
        bias[torch.rand_like(bias) < draw(st.sampled_from([0.0, 0.3, 1.0]))] = -torch.inf
        options["key_bias"] = bias.to(draw(st.sampled_from(DTYPES)))
    if draw(st.booleans()):
        width = inputs[3].shape[1]
        named = torch.arange(width, dtype=torch.int32).expand(len(lengths), key_heads, -1)
        counts = -(-inputs[4] // block_size)
        drop = (named >= counts[:, None, None]) | (torch.rand(named.shape) < 0.5)
        options["block_indices"] = torch.where(drop, -1, named)
    return inputs, options


@settings(max_examples=50, deadline=None)
@given(calls(), st.sampled_from(_library.available_cpu_capabilities()))
def test_matches_definition(call, capability):
    inputs, options = call
    with running_on(capability):
        out, lse = paged_attention(*inputs, return_lse=True, **options)
    query, key, value, *rest = inputs
    expected, expected_lse = reference.paged_attention(
        query.double(), key.double(), value.double(), *rest, return_lse=True, **options
    )
    # Scores of a few dozen carry the rounding of float32 into the weights.
    tolerance = {k: 4 * v for k, v in TOLERANCE[query.dtype].items()}
    torch.testing.assert_close(out.double(), expected, **tolerance)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=2e-5, atol=2e-5)
