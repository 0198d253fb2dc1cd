"""WinnowCache as a cache: rows, lengths, memory, and what it refuses."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    DynamicCache,
    EncoderDecoderCache,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
)
from transformers.masking_utils import sdpa_mask

from tiny_transformers import SIZES, make, prompts
from torch_winnow.integrations import transformers as integration
from torch_winnow.integrations.transformers import BlockSparse, WinnowCache, attention
from torch_winnow.kvcache import BlockPool, BlockPoolExhausted, merge_similar_

CONFIG = LlamaConfig(**SIZES)


@pytest.fixture(scope="module")
def llama():
    return make("llama")


def forward(model, tokens, cache, mask=None, implementation="winnow"):
    model.set_attn_implementation(implementation)
    with torch.no_grad():
        return model(tokens, attention_mask=mask, past_key_values=cache).logits


def near(result, expected):
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)


def states(rows, tokens, dim=8):
    return torch.randn(rows, 2, tokens, dim), torch.randn(rows, 2, tokens, dim)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_history_agrees_with_a_dynamic_cache(data):
    """Steps of any length, crops, reorders, selections, copies and resets, all layers."""
    torch.manual_seed(data.draw(st.integers(0, 99)))
    rows = data.draw(st.integers(1, 3))
    dynamic = DynamicCache(config=CONFIG)
    paged = WinnowCache(CONFIG, block_size=data.draw(st.sampled_from([1, 3, 4])))
    for _ in range(data.draw(st.integers(1, 8))):
        length = dynamic.get_seq_length()
        move = data.draw(
            st.sampled_from(["step", "step", "crop", "take", "repeat", "copy", "reset"])
        )
        if move == "step" or length == 0:
            key, value = states(rows, data.draw(st.integers(1, 9)))
            for layer in range(2):
                for cache in (dynamic, paged):
                    cache.update(key + layer, value - layer, layer)
        elif move == "crop":
            count = data.draw(st.integers(0, length - 1))
            for cache in (dynamic, paged):
                cache.crop(-count)
        elif move == "take":
            chosen = torch.tensor(
                data.draw(st.lists(st.integers(0, rows - 1), min_size=1, max_size=4))
            )
            for cache in (dynamic, paged):
                if len(chosen) == rows:
                    cache.reorder_cache(chosen)
                else:
                    cache.batch_select_indices(chosen)
            rows = len(chosen)
        elif move == "repeat" and rows < 4:
            for cache in (dynamic, paged):
                cache.batch_repeat_interleave(2)
            rows *= 2
        elif move == "copy":
            kept, paged = paged, copy.deepcopy(paged)
            key, value = states(rows, 2)
            kept.update(key, value, 0)  # the original goes on by itself
        elif move == "reset":
            dynamic = DynamicCache(config=CONFIG)
            paged.reset()
            rows = data.draw(st.integers(1, 3))
        assert paged.get_seq_length() == dynamic.get_seq_length()
        assert paged.get_mask_sizes(3, 0) == dynamic.get_mask_sizes(3, 0)
        if dynamic.get_seq_length() > 0:
            assert paged.batch_size == rows
            for layer in range(2):
                assert torch.equal(paged.layers[layer].keys + 0, dynamic.layers[layer].keys)
                assert torch.equal(paged.layers[layer].values + 0, dynamic.layers[layer].values)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_left_padding_in_any_chunks(llama, data):
    """Rows of any padding, prompts in any pieces, reordered and cropped on the way."""
    torch.manual_seed(data.draw(st.integers(0, 99)))
    rows, columns = 3, 12
    padding = data.draw(st.lists(st.integers(0, 11), min_size=rows, max_size=rows))
    mask = (torch.arange(columns) >= torch.tensor(padding)[:, None]).long()
    tokens = torch.randint(1, 64, (rows, columns))
    dynamic, paged = DynamicCache(config=CONFIG), WinnowCache(CONFIG, block_size=4)
    at = 0
    while at < columns:
        step = slice(at, at + data.draw(st.integers(1, 6)))
        seen = mask[:, : step.stop]
        expected = forward(llama, tokens[:, step], dynamic, seen, "sdpa")
        result = forward(llama, tokens[:, step], paged, seen)
        near(result[seen[:, at:].bool()], expected[seen[:, at:].bool()])
        at = min(step.stop, columns)
        if data.draw(st.booleans()):
            order = torch.tensor(data.draw(st.permutations(range(rows))))
            order[0] = order[1]
            for cache in (dynamic, paged):
                cache.reorder_cache(order)
            tokens, mask = tokens[order], mask[order]
        if at > 2 and data.draw(st.booleans()):
            for cache in (dynamic, paged):
                cache.crop(-2)
            at -= 2
            break
    assert paged.get_seq_length() == at


def test_a_prompt_is_shared_by_copies(llama):
    prompt, mask = prompts()
    cache = WinnowCache(CONFIG, block_size=4)
    forward(llama, prompt, cache, mask)
    pool = cache.pages.pool
    free = pool.num_free_blocks
    twins = [copy.deepcopy(cache) for _ in range(5)]
    assert pool.num_free_blocks == free
    step = torch.full((3, 1), 7)
    longer = torch.nn.functional.pad(mask, (0, 1), value=1)
    expected = forward(llama, step, cache, longer)
    for twin in twins:
        assert torch.equal(forward(llama, step, twin, longer), expected)
    del twins, twin, cache, expected
    gc.collect()
    assert pool.num_free_blocks == pool.num_blocks


def test_the_pool_grows_and_no_block_is_lost(llama):
    cache = WinnowCache(CONFIG, block_size=4)
    cache.update(*states(2, 3), 0)
    small = cache.pages.pool.num_blocks
    key, value = states(2, 200)
    for at in range(0, 200, 7):
        cache.update(key[:, :, at : at + 7], value[:, :, at : at + 7], 0)
    pool = cache.pages.pool
    assert pool.num_blocks > small
    assert pool.num_blocks - pool.num_free_blocks == 2 * 51
    assert torch.equal((cache.layers[0].keys + 0)[:, :, 3:], key)
    cache.reset()
    assert pool.num_free_blocks == pool.num_blocks


def test_exhaustion_changes_nothing(llama):
    cache = WinnowCache(CONFIG, max_cache_len=8, block_size=4)
    tokens = torch.randint(1, 64, (2, 7))
    forward(llama, tokens, cache)
    assert cache.get_max_length() == 8
    assert cache.pages.pool.num_blocks == 4
    with pytest.raises(BlockPoolExhausted, match="2 blocks needed, 0 free of 4"):
        forward(llama, tokens[:, :2], cache)
    assert cache.get_seq_length() == 7
    expected = forward(llama, torch.cat([tokens, tokens[:, :1]], 1), None)[:, -1:]
    near(forward(llama, tokens[:, :1], cache), expected)

    pool = BlockPool(5, num_layers=2, num_kv_heads=2, head_dim=8, block_size=4, dtype=torch.float32)
    one, two = WinnowCache(CONFIG, pool=pool), WinnowCache(CONFIG, pool=pool)
    forward(llama, tokens, one)
    with pytest.raises(BlockPoolExhausted):
        forward(llama, tokens, two)
    forward(llama, tokens[:1, :3], two)
    assert pool.num_free_blocks == 0


def test_a_larger_batch_within_the_same_length(llama):
    """The limit is a row's, so more rows are more blocks."""
    cache = WinnowCache(CONFIG, max_cache_len=8, block_size=4)
    forward(llama, torch.randint(1, 64, (1, 6)), cache)
    cache.batch_repeat_interleave(3)
    tokens = torch.randint(1, 64, (3, 2))
    forward(llama, tokens, cache)
    assert cache.pages.pool.num_blocks == 6
    cache.reset()
    forward(llama, torch.randint(1, 64, (5, 8)), cache)
    assert cache.get_seq_length() == 8


# What does not work says so.


def test_refusals():
    with pytest.raises(ValueError, match="layer 0 is 'linear_attention'"):
        WinnowCache(MambaConfig(num_hidden_layers=1))
    with pytest.raises(ValueError, match="block_size: expected at least 1, got 0"):
        WinnowCache(CONFIG, block_size=0)
    with pytest.raises(ValueError, match="max_cache_len: expected an integer, got 2.5"):
        WinnowCache(CONFIG, max_cache_len=2.5)
    with pytest.raises(ValueError, match="sparse: expected a BlockSparse or None, got 4"):
        WinnowCache(CONFIG, sparse=4)
    with pytest.raises(ValueError, match="config: expected the config of a model, got 'llama'"):
        WinnowCache("llama")
    with pytest.raises(ValueError, match="k: expected at least sink_blocks \\+ recent_blocks = 2"):
        BlockSparse(k=1)
    with pytest.raises(ValueError, match="recent_blocks: expected at least 1, got 0"):
        BlockSparse(k=4, recent_blocks=0)
    pool = BlockPool(4, num_layers=1, num_kv_heads=2, head_dim=8, dtype=torch.float32)
    with pytest.raises(ValueError, match="pool: expected num_layers=2 as in config"):
        WinnowCache(CONFIG, pool=pool)
    with pytest.raises(ValueError, match="pool: expected a BlockPool or None, got 64"):
        WinnowCache(CONFIG, pool=64)
    with pytest.raises(ValueError, match="summary: expected 'minmax' or 'mean', got 'max'"):
        BlockSparse(k=4, summary="max")


def test_before_the_first_pass():
    """There is nothing to read, and nothing to rearrange."""
    cache = WinnowCache(CONFIG)
    with pytest.raises(RuntimeError, match="no pages before the first forward pass"):
        cache.pages  # noqa: B018
    cache.reorder_cache(torch.tensor([0]))
    twin = copy.deepcopy(cache)
    twin.update(*states(2, 3), 0)
    assert (cache.get_seq_length(), twin.get_seq_length()) == (0, 3)
    assert repr(twin) == "WinnowCache(2 layers, 2 rows, 3 columns)"


def test_steps_that_cannot_be_right(llama):
    cache = WinnowCache(CONFIG, block_size=4)
    tokens, mask = prompts()
    forward(llama, tokens, cache, mask)
    step = torch.ones(3, 1, dtype=torch.long)
    with pytest.raises(ValueError, match="attention_mask: shows columns of row 0 that were left"):
        forward(llama, step, cache)  # would show the padding
    with pytest.raises(RuntimeError, match="left padding was not stored"):
        forward(llama, step, cache, torch.nn.functional.pad(mask, (0, 1), value=1), "sdpa")
    with pytest.raises(
        ValueError, match="attention_mask: expected 3 rows, as the cache has, got 2"
    ):
        forward(llama, step[:2], cache, torch.ones(2, 12))
    llama.set_attn_implementation("winnow")
    with pytest.raises(ValueError, match="output_attentions"):
        llama(tokens, output_attentions=True)
    with pytest.raises(ValueError, match="key: requires a gradient"):
        llama(tokens, past_key_values=WinnowCache(CONFIG))
    cache = WinnowCache(CONFIG, block_size=4)
    keys, values = cache.update(*states(1, 5), 0)
    cache.update(*states(1, 1), 0)
    with pytest.raises(RuntimeError, match="read after the cache changed"):
        keys.sum()
    with pytest.raises(RuntimeError, match="call reorder_cache of the cache"):
        cache.layers[0].reorder_cache(torch.tensor([0]))
    with pytest.raises(RuntimeError, match="call reset of the cache"):
        cache.layers[0].reset()
    now = cache.layers[0].keys, cache.layers[0].values
    with pytest.raises(ValueError, match="block_indices: the size of their blocks is not known"):
        attention.winnow_attention(
            torch.nn.Module(), now[0], *now, None, block_indices=torch.zeros(1)
        )


def test_implementations_may_alternate(llama):
    """Without padding, a cache that one implementation filled serves the other."""
    tokens = torch.randint(1, 64, (2, 9))
    expected = forward(llama, tokens, None, implementation="sdpa")
    cache = WinnowCache(CONFIG, block_size=4)
    parts = [
        forward(llama, tokens[:, a:b], cache, implementation=implementation)
        for a, b, implementation in ((0, 4, "sdpa"), (4, 6, "winnow"), (6, 9, "sdpa"))
    ]
    near(torch.cat(parts, 1), expected)


def test_padding_that_sdpa_stored(llama):
    """A prompt under SDPA stores its padding; attention "winnow" then masks it."""
    tokens, mask = prompts()
    cache, rival = WinnowCache(CONFIG, block_size=4), DynamicCache(config=CONFIG)
    for one in (cache, rival):
        forward(llama, tokens, one, mask, "sdpa")
    step, longer = torch.ones(3, 2).long(), torch.nn.functional.pad(mask, (0, 2), value=1)
    near(forward(llama, step, cache, longer), forward(llama, step, rival, longer, "sdpa"))


def test_an_old_transformers_is_named():
    def mask_of_transformers_4(batch_size, cache_position, kv_length): ...

    integration._require(sdpa_mask)
    with pytest.raises(ImportError, match="needs transformers 5 .tested with 5.18."):
        integration._require(mask_of_transformers_4)


def test_a_tensor_mask_over_padding_that_was_not_stored(llama):
    tokens, mask = prompts()
    paged, dynamic = WinnowCache(CONFIG, block_size=4), DynamicCache(config=CONFIG)
    forward(llama, tokens, paged, mask)
    forward(llama, tokens, dynamic, mask, "sdpa")
    step = torch.full((3, 2), 5)
    seen = torch.ones(2, 13, dtype=torch.bool).tril(11).expand(3, 1, 2, 13).clone()
    with pytest.raises(ValueError, match="attention_mask: shows columns of row 0"):
        forward(llama, step, copy.deepcopy(paged), seen)
    seen &= torch.nn.functional.pad(mask, (0, 2), value=1).bool()[:, None, None]
    near(forward(llama, step, paged, seen), forward(llama, step, dynamic, seen, "sdpa"))


def test_a_decoder_that_attends_an_encoder():
    config = BartConfig(
        vocab_size=64,
        d_model=32,
        encoder_layers=1,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
        forced_eos_token_id=None,
        decoder_start_token_id=2,
    )
    torch.manual_seed(0)
    model = BartForConditionalGeneration(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    tokens, mask = prompts()
    options = {"attention_mask": mask, "max_new_tokens": 12, "num_beams": 3, "do_sample": False}
    expected = model.generate(tokens, **options)
    model.set_attn_implementation("winnow")
    cache = EncoderDecoderCache(WinnowCache(config, block_size=4), DynamicCache(config=config))
    assert torch.equal(model.generate(tokens, past_key_values=cache, **options), expected)
    assert cache.self_attention_cache.get_seq_length() == 12


def test_sliding_layers_are_those_of_the_config():
    cache = WinnowCache(MistralConfig(**SIZES, sliding_window=5))
    assert cache.is_sliding == [True, True]
    assert WinnowCache(CONFIG).is_sliding == [False, False]


def test_inference_mode(llama):
    """A pool that is made in inference mode serves outside of it too, and the other way round."""
    tokens = torch.randint(1, 64, (2, 9))
    expected = forward(llama, tokens, None)
    for first, second in ((True, False), (False, True), (True, True)):
        cache = WinnowCache(CONFIG, block_size=4)
        with torch.inference_mode(first):
            head = forward(llama, tokens[:, :5], cache)
        with torch.inference_mode(second):
            tail = forward(llama, tokens[:, 5:], cache)
        near(torch.cat([head, tail], 1), expected)


def test_tokens_that_the_cache_counts_stay_where_they_are(llama):
    pool = BlockPool(
        32,
        num_layers=2,
        num_kv_heads=2,
        head_dim=8,
        block_size=4,
        dtype=torch.float32,
        key_bias=True,
    )
    cache, dynamic = WinnowCache(CONFIG, pool=pool), DynamicCache(config=CONFIG)
    prompt, following = torch.arange(10)[None], torch.tensor([[3]])
    forward(llama, prompt, cache)
    forward(llama, prompt, dynamic)
    keep = torch.tensor([[0, 2, 5]])
    for holds in (cache, copy.deepcopy(cache)):
        for repeats in (1, 2):
            holds.batch_repeat_interleave(repeats)
            with pytest.raises(RuntimeError, match="tokens of a WinnowCache stay where they are"):
                holds.pages.compact_(keep.repeat(repeats, 1))
            with pytest.raises(RuntimeError, match="drop or merge tokens in a fork of its pages"):
                merge_similar_(holds.pages, threshold=0.9)
    dropped = cache.pages.fork([0])
    dropped.compact_(keep)
    assert dropped.seq_lens.tolist() == [3]
    step = forward(llama, following.repeat(2, 1), cache)
    near(step, forward(llama, following, dynamic).repeat(2, 1, 1))
