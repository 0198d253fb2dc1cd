"""Prompts that were run before are not run again, and the tokens are the same."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, LlamaConfig

from tiny_transformers import MODELS, SIZES, make, prompts
from torch_winnow.integrations.transformers import BlockSparse, WinnowCache
from torch_winnow.kvcache import BlockPool, BlockPoolExhausted

BLOCK = 4
OPTIONS = {"max_new_tokens": 8, "do_sample": False}


def columns_run(model):
    """How many columns each forward pass from now on is given."""
    seen = []

    def count(module, arguments, options):
        seen.append(options["input_ids"].shape[1])

    model.register_forward_pre_hook(count, with_kwargs=True)
    return seen


def with_suffix(system, suffix):
    return torch.cat([system, torch.full((len(system), 3), suffix)], 1)


@pytest.mark.parametrize("name", MODELS)
def test_a_system_prompt_runs_once(name):
    """Two requests that share a prompt: the second runs what follows its last whole block."""
    model = make(name)
    model.set_attn_implementation("winnow")
    system = torch.randint(1, 64, (1, 14))
    requests = [with_suffix(system, suffix) for suffix in (5, 9)]
    expected = []
    for request in requests:
        cache = WinnowCache(model.config, block_size=BLOCK)
        expected.append(model.generate(request, past_key_values=cache, **OPTIONS))

    cache = WinnowCache(model.config, block_size=BLOCK)
    assert cache.match_prefix(requests[0]) == 0  # nothing is known, not even a pool
    tokens = model.generate(requests[0], past_key_values=cache, **OPTIONS)
    assert torch.equal(tokens, expected[0])
    assert cache.register_prefix(requests[0]) == 16
    other = WinnowCache(model.config, pool=cache.pages.pool)
    assert other.match_prefix(requests[1]) == 12
    assert other.get_seq_length() == 12
    cache.pages.pool.grow(cache.pages.pool.num_blocks + 8)
    seen = columns_run(model)
    tokens = model.generate(requests[1], past_key_values=other, **OPTIONS)
    assert torch.equal(tokens, expected[1])
    assert seen[0] == 5  # of 17
    holding = cache.pages.block_table[0, :3].tolist()
    assert other.pages.block_table[0, :3].tolist() == holding


@pytest.mark.parametrize("implementation", ["winnow", "sdpa"])
@pytest.mark.parametrize("cache_dtype", [None, torch.int8])
def test_another_cache_shows_what_it_found_in_the_dtype_that_was_stored(
    implementation, cache_dtype
):
    model = make("llama").to(torch.bfloat16)
    model.set_attn_implementation(implementation)
    prompt = torch.randint(1, 64, (1, 17))
    cache = WinnowCache(model.config, block_size=BLOCK, cache_dtype=cache_dtype)
    expected = model.generate(prompt, past_key_values=cache, **OPTIONS)
    assert cache.register_prefix(prompt) == 16
    cache.reset()
    other = WinnowCache(model.config, pool=cache.storage.pool)
    assert other.match_prefix(prompt) == 16
    if cache_dtype is None:
        assert other.layers[0].keys.dtype == torch.bfloat16
    tokens = model.generate(prompt, past_key_values=other, **OPTIONS)
    assert torch.equal(tokens, expected)
    assert other.layers[0].keys.dtype == other.layers[0].keys.dense().dtype == torch.bfloat16


def test_left_padded_rows_go_on_together():
    model = make("llama")
    model.set_attn_implementation("winnow")
    tokens, mask = prompts()
    options = OPTIONS | {"attention_mask": mask}
    cache = WinnowCache(model.config, block_size=BLOCK)
    expected = model.generate(tokens, past_key_values=cache, **options)
    # Rows hold 7, 11 and 2 tokens: 4, 8 and 0 of them are whole blocks, at columns 8, 8 and 9.
    assert cache.register_prefix(tokens, mask) == 0
    cache.reset()
    assert cache.match_prefix(tokens, mask) == 8
    assert cache.pages.seq_lens.tolist() == [4, 8, 0]
    seen = columns_run(model)
    again = model.generate(tokens, past_key_values=cache, **options)
    assert torch.equal(again, expected)
    assert seen[0] == 3


def test_beams_and_sampling_from_a_known_prefix():
    model = make("qwen3")
    model.set_attn_implementation("winnow")
    prompt = torch.randint(1, 64, (2, 13))
    cache = WinnowCache(model.config, block_size=BLOCK)
    with torch.no_grad():
        model(prompt, past_key_values=cache)
    cache.register_prefix(prompt)
    cache.pages.pool.grow(64)  # else what is known gives way to what is run
    cache.reset()
    options = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 8}

    def run(known, **more):
        torch.manual_seed(0)
        cache.reset()
        if known:
            assert cache.match_prefix(prompt) == 12
            cache.batch_repeat_interleave(more.get("num_beams", 1))
        return model.generate(prompt, past_key_values=cache, **options, **more)

    for more in ({"num_beams": 3, "do_sample": False}, {"do_sample": True, "top_k": 20}):
        assert torch.equal(run(True, **more), run(False, **more))


def test_sparse_decoding_summarises_what_was_found():
    model = make("llama")
    model.set_attn_implementation("winnow")
    prompt = torch.randint(1, 64, (1, 41))

    def run(cache):
        return model.generate(prompt, past_key_values=cache, **OPTIONS)

    cache = WinnowCache(model.config, block_size=BLOCK, sparse=BlockSparse(k=3))
    expected = run(cache)
    cache.register_prefix(prompt)
    pool = cache.pages.pool
    pool.grow(4 * pool.num_blocks)
    for other in (cache, WinnowCache(model.config, sparse=BlockSparse(k=3), pool=pool)):
        other.reset()
        # Two columns are left: the step of a single one would be sparse.
        assert other.match_prefix(prompt) == 36
        assert torch.equal(run(other), expected)


def test_an_old_prefix_gives_way_to_a_new_prompt():
    """A prefix that nobody holds is memory to use; what is half gone is found as far as it goes."""
    model = make("llama")
    model.set_attn_implementation("winnow")
    pool = BlockPool(
        8, num_layers=2, num_kv_heads=2, head_dim=8, block_size=BLOCK, dtype=torch.float32
    )
    prompt = torch.randint(1, 64, (1, 16))
    cache = WinnowCache(model.config, pool=pool)
    with torch.no_grad():
        model(prompt, past_key_values=cache)
        assert cache.register_prefix(prompt) == 16
        cache.reset()
        model(torch.randint(1, 64, (1, 22)), past_key_values=cache)
        other = WinnowCache(model.config, pool=pool)
        assert other.match_prefix(prompt) == 8
        with pytest.raises(BlockPoolExhausted):
            model(prompt[:, 8:], past_key_values=other)


def test_an_unknown_prompt_covers_nothing():
    pool = BlockPool(8, num_layers=2, num_kv_heads=2, head_dim=8, dtype=torch.float32)
    cache = WinnowCache(LlamaConfig(**SIZES), pool=pool)
    assert cache.match_prefix(torch.ones(2, 6, dtype=torch.long)) == 0
    assert cache.get_seq_length() == 0
    assert pool.num_free_blocks == 8


def test_refusals():
    cache = WinnowCache(LlamaConfig(**SIZES), block_size=BLOCK)
    tokens = torch.ones(2, 6, dtype=torch.long)
    with pytest.raises(ValueError, match="input_ids: expected 0 rows, as the cache has, got 2"):
        cache.register_prefix(tokens)
    with pytest.raises(ValueError, match=r"input_ids: expected \(B, L\) integers, got \(6,\)"):
        cache.match_prefix(tokens[0])
    with pytest.raises(ValueError, match=r"attention_mask: expected \(2, 6\) as input_ids"):
        cache.match_prefix(tokens, tokens[:, :5])
    with pytest.raises(ValueError, match="attention_mask: expected padding at the left only"):
        cache.match_prefix(tokens, torch.tensor([[1, 1, 1, 1, 1, 0]] * 2))
    key = torch.zeros(2, 2, 6, 8)
    for layer in range(2):
        cache.update(key, key, layer)
    with pytest.raises(ValueError, match="only an empty cache can begin with a known prefix"):
        cache.match_prefix(tokens)
    with pytest.raises(ValueError, match="token_ids: expected at most 6 tokens"):
        cache.register_prefix(torch.ones(2, 8, dtype=torch.long))


def test_the_cache_of_transformers_agrees():
    """Against generation without any of this."""
    model = make("llama")
    prompt = torch.randint(1, 64, (1, 21))
    expected = model.generate(prompt, past_key_values=DynamicCache(config=model.config), **OPTIONS)
    model.set_attn_implementation("winnow")
    cache = WinnowCache(model.config, block_size=BLOCK)
    for _ in range(3):
        cache.match_prefix(prompt)
        assert torch.equal(model.generate(prompt, past_key_values=cache, **OPTIONS), expected)
        cache.register_prefix(prompt)
        cache.reset()
