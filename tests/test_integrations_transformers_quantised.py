"""WinnowCache(cache_dtype=...): the logits of generation stay close to full precision."""

from __future__ import annotations

import copy

import pytest
import torch

pytest.importorskip("transformers", minversion="5")

from tiny_transformers import MODELS
from torch_winnow.integrations.transformers import BlockSparse, WinnowCache
from torch_winnow.kvcache import BlockPool

DTYPES = pytest.mark.parametrize("code", [torch.int8, torch.float8_e4m3fn], ids=["int8", "float8"])
BOUND = {torch.int8: 0.03, torch.float8_e4m3fn: 0.1}  # of the logits' norm


def model_of(name):
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    model.set_attn_implementation("winnow")
    return model


def logits_of(model, cache, tokens, mask):
    """Of a prompt and then token by token."""
    with torch.no_grad():
        first = model(tokens[:, :12], attention_mask=mask[:, :12], past_key_values=cache).logits
        steps = [
            model(tokens[:, t : t + 1], attention_mask=mask[:, : t + 1], past_key_values=cache)
            for t in range(12, tokens.shape[1])
        ]
    return torch.cat([first[:, -1:], *(step.logits for step in steps)], 1)


@DTYPES
@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3"])
@pytest.mark.parametrize("sparse", [None, BlockSparse(k=20)], ids=["dense", "sparse"])
def test_logits_stay_close(code, name, sparse):
    model = model_of(name)
    tokens = torch.randint(1, 64, (2, 30))
    mask = torch.ones_like(tokens)
    mask[0, :3] = 0  # left padding
    expected = logits_of(model, WinnowCache(model.config, block_size=4), tokens, mask)
    cache = WinnowCache(model.config, block_size=4, cache_dtype=code, sparse=sparse)
    ours = logits_of(model, cache, tokens, mask)
    assert cache.pages.pool.dtype == code
    assert (ours - expected).norm() < BOUND[code] * expected.norm()
    assert not torch.equal(ours, expected)


@DTYPES
def test_generation_with_beams_and_forks(code):
    model = model_of("llama").to(torch.bfloat16)
    tokens = torch.randint(1, 64, (2, 10))
    cache = WinnowCache(model.config, block_size=4, cache_dtype=code)
    options = {"do_sample": False, "num_beams": 3, "max_new_tokens": 8}
    result = model.generate(
        tokens, attention_mask=torch.ones_like(tokens), past_key_values=cache, **options
    )
    assert result.shape == (2, 18)
    twin = copy.deepcopy(cache)
    assert twin.layers[0].keys.dtype == torch.bfloat16
    assert torch.equal(twin.layers[0].keys.clone(), cache.layers[0].keys.clone())


def test_another_implementation_reads_numbers():
    """Dense copies are dequantised: SDPA over the cache agrees with attention over its pages."""
    model = model_of("llama")
    tokens, caches = torch.randint(1, 64, (1, 14)), []
    for implementation in ("winnow", "sdpa"):
        model.set_attn_implementation(implementation)
        cache = WinnowCache(model.config, block_size=4, cache_dtype=torch.int8)
        with torch.no_grad():
            model(tokens[:, :13], past_key_values=cache)
            caches.append(model(tokens[:, 13:], past_key_values=cache).logits)
    torch.testing.assert_close(*caches, rtol=1e-3, atol=1e-3)


def test_refusals():
    config = model_of("llama").config
    with pytest.raises(ValueError, match=r"cache_dtype: expected torch.int8.*got torch.uint8"):
        WinnowCache(config, cache_dtype=torch.uint8)
    pool = BlockPool(4, num_layers=2, num_kv_heads=2, head_dim=8, dtype=torch.float32)
    with pytest.raises(ValueError, match="cache_dtype: expected None or that of the pool"):
        WinnowCache(config, pool=pool, cache_dtype=torch.int8)
