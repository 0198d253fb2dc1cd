"""A transformers model over pages against the caches of transformers: decoding, and resampling.

One step of a Llama with the heads of an 8B model and little else: attention is what is measured.
The limit is the bytes of keys and values over the read bandwidth of the same run.
"""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

from torch_winnow.integrations.transformers import BlockSparse, WinnowCache, register

register()

LAYERS, KEY_HEADS, DIM = 2, 8, 128
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
STEPS = 64  # room for the steps that are timed


def make_model(dtype: torch.dtype, implementation: str) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=512,
        intermediate_size=512,
        num_hidden_layers=LAYERS,
        num_attention_heads=32,
        num_key_value_heads=KEY_HEADS,
        head_dim=DIM,
        max_position_embeddings=65536,
        attn_implementation=implementation,
    )
    return LlamaForCausalLM(config).to(dtype).eval().requires_grad_(False)


def make_cache(impl: str, config: LlamaConfig, length: int):
    if impl == "DynamicCache + sdpa":
        return DynamicCache(config=config)
    if impl == "StaticCache + sdpa":
        return StaticCache(config=config, max_cache_len=length + STEPS)
    sparse = BlockSparse(k=length // 64 // 10) if "sparse" in impl else None
    return WinnowCache(config, sparse=sparse)


def fill(cache, rows: int, length: int, dtype: torch.dtype) -> int:
    """Random keys and values as a prompt leaves them; returns their bytes."""
    generator = torch.Generator().manual_seed(1)
    size = 0
    for layer in range(LAYERS):
        key, value = torch.randn(
            2, rows, KEY_HEADS, length, DIM, generator=generator, dtype=torch.float32
        ).to(dtype)
        cache.update(key, value, layer)
        size += key.nbytes + value.nbytes
    return size


def step(model, cache, rows: int) -> torch.Tensor:
    """One token more. A few of them do not change what a step costs."""
    tokens = torch.zeros(rows, 1, dtype=torch.long)
    return model(tokens, past_key_values=cache).logits


@pytest.mark.parametrize(
    "impl", ["winnow", "winnow, sparse 10%", "DynamicCache + sdpa", "StaticCache + sdpa"]
)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [4096, 16384, 32768])
def test_decode(measure, benchmark, length, dtype, impl):
    rows = 1
    expected = None
    if "sparse" not in impl:
        rival = make_cache("DynamicCache + sdpa", make_model(torch.float32, "sdpa").config, 512)
        fill(rival, rows, 512, DTYPES[dtype])
        expected = step(make_model(DTYPES[dtype], "sdpa"), rival, rows)
    model = make_model(DTYPES[dtype], "winnow" if impl.startswith("winnow") else "sdpa")
    if expected is not None:
        small = make_cache(impl, model.config, 512)
        fill(small, rows, 512, DTYPES[dtype])
        tolerance = {"rtol": 5e-2, "atol": 5e-2} if dtype == "bfloat16" else {}
        torch.testing.assert_close(step(model, small, rows), expected, **tolerance)
    cache = make_cache(impl, model.config, length)
    size = fill(cache, rows, length, DTYPES[dtype])
    measure(
        f"transformers decode {rows}x{length} {dtype}",
        impl,
        lambda: step(model, cache, rows),
        moved_bytes=size * (0.1 if "sparse" in impl else 1),
        rounds=7,
    )
    if impl.startswith("winnow"):
        pool = cache.pages.pool
        held = pool.key_pages.nbytes + pool.value_pages.nbytes
    else:
        held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    benchmark.extra_info["cache_bytes"] = held


@pytest.mark.parametrize("impl", ["winnow", "DynamicCache + sdpa"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_resample(measure, dtype, impl):
    """Eight particles of 2048 tokens follow their ancestors and take a token: a step of SMC.

    The token is part of it, because pages put copies off until somebody writes.
    """
    rows, length = 8, 2048
    model = make_model(DTYPES[dtype], "winnow")
    cache = make_cache(impl, model.config, length)
    size = fill(cache, rows, length, DTYPES[dtype])
    ancestors = torch.tensor([0, 0, 0, 3, 3, 5, 6, 6])
    token = torch.randn(rows, KEY_HEADS, 1, DIM).to(DTYPES[dtype])

    def resample() -> None:
        cache.reorder_cache(ancestors)
        for layer in range(LAYERS):
            cache.update(token, token, layer)

    measure(
        f"transformers resample {rows}x{length} {dtype}",
        impl,
        resample,
        moved_bytes=2 * size,  # what copying costs: pages stay below this limit
        rounds=7,
    )
