"""Attention "winnow" in transformers: the tokens of a model's own attention, whatever generates."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

from tiny_transformers import DEFINITION, MODELS, SIZES, make, prompts
from torch_winnow import kvcache
from torch_winnow.integrations.transformers import WinnowCache, attention

MODES = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True},
    "beams": {"do_sample": False, "num_beams": 3},
    "beam sampling": {"do_sample": True, "num_beams": 2, "num_return_sequences": 2},
    "chunked prompt": {"do_sample": False, "prefill_chunk_size": 4},
}


@pytest.fixture(scope="module")
def models():
    made = {}

    def get(name):
        if name not in made:
            made[name] = make(name)
        return made[name]

    return get


def generate(model, implementation, tokens, cache=None, **options):
    model.set_attn_implementation(implementation)
    torch.manual_seed(1)
    options = {"max_new_tokens": 12, "attention_mask": torch.ones_like(tokens)} | options
    return model.generate(tokens, past_key_values=cache, **options)


@pytest.fixture
def dense_calls(monkeypatch):
    """How often attention left the pages."""
    calls = []

    def count(*args, **kwargs):
        calls.append(1)
        return dense(*args, **kwargs)

    dense = attention.dense_attention
    monkeypatch.setattr(attention, "dense_attention", count)
    return calls


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", MODELS)
def test_generates_the_same_tokens(models, dense_calls, name, mode):
    model, (tokens, mask) = models(name), prompts()
    options = MODES[mode] | {"attention_mask": mask}
    own = DEFINITION.get(name, "sdpa")
    expected = generate(model, own, tokens, **options)
    cache = WinnowCache(model.config, block_size=4)
    assert torch.equal(generate(model, "winnow", tokens, cache, **options), expected)
    assert name == "gemma2" or not dense_calls  # softcaps are dense, all else is read in pages
    padding = (mask == 0).sum(1).repeat_interleave(cache.batch_size // len(mask))
    stored = cache.get_seq_length() - padding
    assert cache.pages.seq_lens.tolist() == stored[: cache.batch_size].tolist()

    # Pages under the model's own attention; and attention "winnow" over its own cache.
    other = WinnowCache(model.config, block_size=4)
    assert torch.equal(generate(model, own, tokens, other, **options), expected)
    assert torch.equal(generate(model, "winnow", tokens, **options), expected)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_other_caches_under_winnow(models, name):
    model, (tokens, mask) = models(name), prompts()
    expected = generate(model, "sdpa", tokens, attention_mask=mask)
    for cache in (
        DynamicCache(config=model.config),
        StaticCache(config=model.config, max_cache_len=24),
    ):
        assert torch.equal(generate(model, "winnow", tokens, cache, attention_mask=mask), expected)


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3", "gpt_neox"])
def test_assisted_generation(models, name):
    model, tokens = models(name), prompts()[0][1:2]
    expected = generate(model, "sdpa", tokens, max_new_tokens=20)
    # An assistant that is often wrong: every rejection crops the cache.
    assistant = copy.deepcopy(model)
    torch.manual_seed(5)
    for parameter in assistant.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    cache = WinnowCache(model.config, block_size=4)
    options = {"assistant_model": assistant, "do_sample": False, "max_new_tokens": 20}
    assert torch.equal(generate(model, "winnow", tokens, cache, **options), expected)
    lookup = {"prompt_lookup_num_tokens": 3, "do_sample": False, "max_new_tokens": 20}
    cache = WinnowCache(model.config, block_size=4)
    assert torch.equal(generate(model, "winnow", tokens, cache, **lookup), expected)


def logits(model, implementation, tokens, cache=None, **options):
    model.set_attn_implementation(implementation)
    with torch.no_grad():
        return model(tokens, past_key_values=cache, **options).logits


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt_oss"])
def test_masks_that_are_no_left_padding(models, dense_calls, name):
    """Right padding, holes and 4-dimensional masks leave the pages and stay exact."""
    model, (tokens, _) = models(name), prompts()
    own = DEFINITION.get(name, "sdpa")
    tokens = tokens.clamp(min=1)
    mask = torch.ones_like(tokens)
    mask[0, 7:] = 0
    mask[1, 3:5] = 0
    more = torch.randint(1, 64, (3, 2))
    longer = torch.cat([mask, torch.ones_like(more)], 1)
    results = []
    for implementation, cache in (
        (own, DynamicCache(config=model.config)),
        ("winnow", WinnowCache(model.config, block_size=4)),
    ):
        first = logits(model, implementation, tokens, cache, attention_mask=mask)
        second = logits(model, implementation, more, cache, attention_mask=longer)
        results.append((first[mask.bool()], second))
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-4)
    assert dense_calls


def test_a_mask_of_four_dimensions(models):
    model, (tokens, _) = models("llama"), prompts()
    mask = torch.ones(3, 1, 11, 11, dtype=torch.bool).tril()
    mask[:, :, 5:, 2] = False
    expected = logits(model, "sdpa", tokens, attention_mask=mask)
    cache = WinnowCache(model.config, block_size=4)
    result = logits(model, "winnow", tokens, cache, attention_mask=mask)
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3", "gpt_oss"])
def test_training_has_the_gradients_of_the_model(models, name):
    model, (tokens, mask) = copy.deepcopy(models(name)), prompts()
    # What padding itself attends is nobody's definition: no label is predicted from it.
    labels = tokens.clone()
    labels[:, 1:][mask[:, :-1] == 0] = -100
    gradients = []
    for implementation in (DEFINITION.get(name, "sdpa"), "winnow"):
        model.set_attn_implementation(implementation)
        model.zero_grad()
        model(tokens, attention_mask=mask, labels=labels).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for key, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], gradient, rtol=1e-3, atol=1e-5)


def test_bfloat16_is_as_near_to_float32_as_sdpa(models):
    model = copy.deepcopy(models("llama"))
    tokens, mask = prompts()
    exact = logits(model, "sdpa", tokens, attention_mask=mask)
    model.bfloat16()
    rival = logits(model, "sdpa", tokens, attention_mask=mask)
    cache = WinnowCache(model.config, block_size=4)
    ours = logits(model, "winnow", tokens, cache, attention_mask=mask)
    real = mask.bool()
    error = [(x.float() - exact)[real].pow(2).mean().sqrt() for x in (ours, rival)]
    assert error[0] < 1.1 * error[1]


def test_keys_and_values_of_different_width():
    """Attention functions see the widths of the states, not of the config."""
    module = torch.nn.Module()
    storage_config = LlamaConfig(**SIZES)
    cache = WinnowCache(storage_config, block_size=4)
    query, key = torch.randn(2, 4, 6, 24), torch.randn(2, 2, 6, 24)
    value = torch.randn(2, 2, 6, 10)
    out, _ = attention.winnow_attention(module, query, *cache.update(key, value, 0), None)
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, enable_gqa=True
    )
    torch.testing.assert_close(out, expected.transpose(1, 2))


def test_a_model_that_transforms_its_cached_keys(models, dense_calls):
    """Any operator on what update returned sees dense tensors."""
    cache = WinnowCache(models("llama").config, block_size=4)
    key, value = torch.randn(2, 3, 2, 9, 8).unbind()
    for step in (slice(0, 6), slice(6, 9)):
        keys, values = cache.update(key[:, :, step], value[:, :, step], 0)
    assert keys.shape == key.shape
    torch.testing.assert_close(keys + 0, key, rtol=0, atol=0)
    torch.testing.assert_close(torch.cat([values, values], 1)[:, 2:], value, rtol=0, atol=0)
    query = torch.randn(3, 4, 1, 8)
    module = torch.nn.Module()
    module.num_key_value_groups = 2
    out, _ = attention.winnow_attention(module, query, keys * 2, values, None)
    assert dense_calls
    expected, _ = attention.winnow_attention(module, 2 * query, keys, values, None)
    torch.testing.assert_close(out, expected)


def test_padding_in_the_prompt_needs_no_blocks():
    model = LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
    tokens, mask = torch.ones(2, 64, dtype=torch.long), torch.ones(2, 64, dtype=torch.long)
    mask[0, :62] = 0
    cache = WinnowCache(model.config, block_size=4)
    logits(model, "winnow", tokens, cache, attention_mask=mask)
    assert cache.pages.seq_lens.tolist() == [2, 64]
    assert (cache.pages.block_table >= 0).sum(1).tolist() == [1, 16]
    assert cache.get_seq_length() == 64


def test_beams_copy_a_block_at_most(models, monkeypatch):
    """Reordering moves the table; only blocks that are written to while shared are copied."""
    copied = []
    copy_blocks = kvcache.PagedKVCache._copy

    def count(self):
        copied.append(len(self._native.copies()[0]))
        copy_blocks(self)

    monkeypatch.setattr(kvcache.PagedKVCache, "_copy", count)
    model, tokens = models("llama"), prompts()[0][1:2]
    cache = WinnowCache(model.config, block_size=4)
    generate(model, "winnow", tokens, cache, num_beams=4, do_sample=False, max_new_tokens=16)
    assert sum(copied) <= 3 * 16
    assert max(copied) <= 3
