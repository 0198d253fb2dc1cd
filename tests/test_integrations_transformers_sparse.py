"""WinnowCache attending to chosen blocks: its own selection, and models that bring theirs."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import (
    DynamicCache,
    LlamaConfig,
)
from transformers.models.minimax_m3_vl.configuration_minimax_m3_vl import MiniMaxM3VLTextConfig
from transformers.models.minimax_m3_vl.modeling_minimax_m3_vl import MiniMaxM3VLTextModel

from test_integrations_transformers_cache import forward, near, states
from tiny_transformers import SIZES, make
from torch_winnow import reference
from torch_winnow.integrations.transformers import BlockSparse, WinnowCache, attention, dense
from torch_winnow.kvcache import BlockPool

CONFIG = LlamaConfig(**SIZES)


@pytest.fixture(scope="module")
def llama():
    return make("llama")


@pytest.mark.parametrize("summary", ["minmax", "mean"])
def test_sparse_steps_attend_the_chosen_blocks(monkeypatch, llama, summary):
    """The selection is that of summaries made afresh, after forks, crops and growth too."""
    from torch_winnow.kvcache import block_summaries, paged_attention, score_blocks, select_blocks

    chosen = []

    def record(query, key_pages, value_pages, table, lengths, **options):
        blocks = options.get("block_indices")
        if blocks is not None:
            summaries = block_summaries(key_pages, table, lengths, summary)
            scores = score_blocks(query, summaries)
            expected = select_blocks(
                scores, 3, seq_lens=lengths, block_size=4, sink_blocks=1, recent_blocks=1
            )
            assert torch.equal(blocks, expected)
            chosen.append(blocks)
        return paged_attention(query, key_pages, value_pages, table, lengths, **options)

    monkeypatch.setattr(attention, "paged_attention", record)
    cache = WinnowCache(CONFIG, block_size=4, sparse=BlockSparse(k=3, summary=summary))
    tokens, mask = torch.randint(1, 64, (3, 18)), torch.ones(3, 18, dtype=torch.long)
    mask[1, :9] = 0
    forward(llama, tokens, cache, mask)
    for step in range(12):
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
        forward(llama, torch.randint(1, 64, (3, 1)), cache, mask)
        if step == 3:
            cache.reorder_cache(torch.tensor([2, 1, 2]))
            mask = mask[[2, 1, 2]]
        if step == 6:
            cache.crop(-5)
            mask = mask[:, :-5]
        if step == 9:
            cache = copy.deepcopy(cache)
    assert len(chosen) == 24
    assert any((blocks[0] != blocks[2]).any() for blocks in chosen)


def test_sparse_with_every_block_is_dense(llama):
    tokens = torch.randint(1, 64, (2, 10))
    options = {"max_new_tokens": 12, "do_sample": False, "attention_mask": torch.ones_like(tokens)}
    llama.set_attn_implementation("winnow")
    results = [
        llama.generate(
            tokens, past_key_values=WinnowCache(CONFIG, block_size=4, sparse=sparse), **options
        )
        for sparse in (None, BlockSparse(k=6), BlockSparse(k=2))
    ]
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_a_shared_pool_has_the_summaries_that_are_asked_for(llama):
    sizes = {"num_layers": 2, "num_kv_heads": 2, "head_dim": 8, "block_size": 4}
    pool = BlockPool(40, dtype=torch.float32, summaries="mean", **sizes)
    with pytest.raises(ValueError, match="pool: expected summaries='minmax' as in sparse, got"):
        WinnowCache(CONFIG, pool=pool, sparse=BlockSparse(k=3))
    tokens = torch.randint(1, 64, (2, 21))
    results = []
    for options in ({"pool": pool}, {"block_size": 4}):
        cache = WinnowCache(CONFIG, sparse=BlockSparse(k=3, summary="mean"), **options)
        forward(llama, tokens[:, :20], cache)
        results.append(forward(llama, tokens[:, 20:], cache))
    assert torch.equal(results[0], results[1])


# Models with a selection of their own.


def minimax():
    torch.manual_seed(0)
    config = MiniMaxM3VLTextConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        dense_intermediate_size=32,
        shared_intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_local_experts=2,
        num_experts_per_tok=1,
        index_n_heads=2,
        index_head_dim=8,
        index_block_size=4,
        index_topk_blocks=2,
        index_local_blocks=1,
        layer_types=["full_attention", "minimax_m3_sparse"],
        mlp_layer_types=["dense", "dense"],
        max_position_embeddings=128,
    )
    model = MiniMaxM3VLTextModel(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return model


@pytest.mark.parametrize("block_size", [4, 2, 8])
def test_a_model_that_brings_its_blocks(monkeypatch, block_size):
    calls = []
    dense_attention = dense.dense_attention

    def count(*args, **kwargs):
        calls.append(1)
        return dense_attention(*args, **kwargs)

    monkeypatch.setattr(attention, "dense_attention", count)
    model = minimax()
    tokens = torch.randint(1, 64, (2, 30))
    order = torch.tensor([1, 1])
    outputs = []
    for implementation, cache in (
        ("sdpa", DynamicCache(config=model.config)),
        ("winnow", WinnowCache(model.config, block_size=block_size)),
        ("winnow", DynamicCache(config=model.config)),
    ):
        calls.clear()
        model.set_attn_implementation(implementation)
        with torch.no_grad():
            parts = [
                model(tokens[:, at], past_key_values=cache).last_hidden_state
                for at in (slice(0, 17), slice(17, 22), slice(22, 23), slice(23, 24))
            ]
            cache.reorder_cache(order)
            parts.append(model(tokens[:, 24:25], past_key_values=cache).last_hidden_state)
            cache.crop(-2)
            parts.append(model(tokens[:, 25:], past_key_values=cache).last_hidden_state)
        outputs.append(torch.cat(parts, 1))
        if isinstance(cache, WinnowCache):
            # Pages larger than the model's blocks cannot tell them apart.
            assert len(calls) == (6 if block_size == 8 else 0)
    near(outputs[1], outputs[0])
    near(outputs[2], outputs[0])
    assert cache.layers[1].idx_keys.shape[2] == 28


def test_a_model_with_an_indexer_shares_no_prefix():
    cache = WinnowCache(minimax().config)
    with pytest.raises(ValueError, match="keeps the keys of its indexer too"):
        cache.match_prefix(torch.ones(1, 6, dtype=torch.long))


# Keys and values in tensors.


def attend(query, key, value, mask, **options):
    module = torch.nn.Module()
    module.num_key_value_groups = query.shape[1] // key.shape[1]
    return attention.winnow_attention(module, query, key, value, mask, **options)[0]


def additive(mask):
    return torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)


def test_masks_of_either_kind_cut_blocks():
    query, (key, value) = torch.randn(2, 4, 3, 8), states(2, 22)
    blocks = torch.tensor([0, 2, 5]).expand(2, 2, 3, 3)
    mask = torch.rand(2, 1, 3, 22) < 0.7
    mask[..., 0] = True
    options = {"block_indices": blocks, "block_size": 4}
    out = attend(query, key, value, mask, **options)
    near(attend(query, key, value, additive(mask), **options), out)
    value[:, :, 4:8] = 1e30  # in a block that is not chosen
    near(attend(query, key, value, mask, **options), out)
    with pytest.raises(ValueError, match=r"block_indices: expected .* H dividing 4 and T=3, got"):
        attend(query, key, value, mask, block_indices=blocks[:, :, :2], block_size=4)


def test_a_softcap_without_a_mask_is_causal():
    query, (key, value) = torch.randn(2, 4, 6, 8), states(2, 6)
    causal = torch.ones(6, 6, dtype=torch.bool).tril().expand(2, 1, 6, 6)
    out = attend(query, key, value, None, softcap=2.0)
    near(attend(query, key, value, causal, softcap=2.0), out)
    near(out[:, 0], value.repeat_interleave(2, 1)[:, :, 0])  # the first sees itself
    with pytest.raises(ValueError, match="position_bias: expected None together with a softcap"):
        attend(query, key, value, None, softcap=2.0, position_bias=torch.zeros(1))


def test_blocks_against_the_definition():
    """Any selection, for several queries at once."""
    torch.manual_seed(0)
    cache = WinnowCache(CONFIG, block_size=4)
    key, value = cache.update(*states(2, 22), 0)
    query = torch.randn(2, 4, 3, 8)
    blocks = torch.rand(2, 2, 3, 6).argsort(-1)[..., :3]
    blocks[0, 1, 2, 1:] = -1
    out, _ = attention.winnow_attention(
        torch.nn.Module(), query, key, value, None, block_indices=blocks, block_size=4
    )
    pages = cache.pages.pool._layers[0]
    for t in range(3):
        lengths = cache.pages.seq_lens - 2 + t
        expected = reference.paged_attention(
            query[:, :, t : t + 1],
            *pages,
            cache.pages.block_table,
            lengths,
            block_indices=blocks[:, :, t].sort(-1).values.int(),
        )
        torch.testing.assert_close(out[:, t], expected[:, :, 0])
