"""torch.set_default_device and torch.set_default_dtype change nothing that was not left to them.

A default device is where many users keep their GPU; "meta" shows here what would have gone there.
"""

from __future__ import annotations

import pytest
import torch

from torch_winnow.kvcache import BlockPool, PagedKVCache, merge_similar_, paged_attention
from torch_winnow.models import (
    CATConfig,
    CompressAttendTransformer,
    DenseConfig,
    DenseDecoder,
    StackConfig,
)
from torch_winnow.resampling import FKSteering, resample, sample_without_replacement
from torch_winnow.unmasking import (
    EntropyThreshold,
    Template,
    generate,
    linear_logit_stats,
    logit_stats,
    presets,
    score_span,
    select_positions,
    speculative_verify,
)

NUMBERS = torch.randn(2, 6, 20, generator=torch.Generator().manual_seed(0))
KEYS = NUMBERS[:, None, :, :16].expand(2, 2, 6, 16).contiguous()
TOKENS = torch.full((2, 6), 19)


def pages(dtype: torch.dtype) -> list[torch.Tensor]:
    pool = BlockPool(
        24, num_layers=1, num_kv_heads=2, head_dim=16, block_size=4, dtype=dtype, key_bias=True
    )
    cache = PagedKVCache(pool, 2)
    cache.append(0, KEYS, KEYS)
    cache.append(0, KEYS[:, :, :1], KEYS[:, :, :1])
    forks = cache.fork([0, 1, 1])
    forks.append(0, KEYS[[0, 0, 1]], KEYS[[0, 0, 1]], lengths=[1, 2, 6])
    forks.permute_([2, 0, 1])
    forks.compact_(torch.tensor([[0, 2, 3]], device="cpu").expand(3, 3))
    merge_similar_(forks, threshold=0.9)
    scales = {} if pool.key_scales is None else {"key_scales": pool.key_scales[0]}
    if pool.value_scales is not None:
        scales["value_scales"] = pool.value_scales[0]
    query = KEYS[[0, 1, 0], :, :1]
    where = pool.key_pages[0], pool.value_pages[0], forks.block_table, forks.seq_lens
    return [forks.seq_lens, paged_attention(query, *where, **scales)]


def unmasking() -> list[torch.Tensor]:
    result = generate(
        lambda x: NUMBERS, TOKENS, mask_id=19, rule=EntropyThreshold(0.2), block_length=3, seed=0
    )
    template = Template([[1, 2], ("answer", 3), [4]], mask_id=19)
    filled = template.fill(answer=[5, 6, 7])[None]
    span = score_span(lambda x: NUMBERS[:1], filled, template.positions("answer"), mask_id=19)
    verified = speculative_verify(TOKENS[:, :5], NUMBERS[:, :5], NUMBERS, seed=1)
    schedule = torch.tensor(
        presets.dream(gen_length=16, steps=7, alg="entropy")["rule"].num_tokens, device="cpu"
    )
    return [
        *(result.tokens, result.entropies, template.tokens, span.log_probs, schedule),
        *(verified.tokens, verified.accepted),
        logit_stats(NUMBERS, seed=3, suppress_ids=[1, 2], top_k=5).token,
        linear_logit_stats(NUMBERS[0], NUMBERS[1], suppress_ids=[1]).entropy,
        select_positions(NUMBERS[:, :, 0], TOKENS == 19, EntropyThreshold(0.2))[1],
    ]


def particles() -> list[torch.Tensor]:
    steering = FKSteering(seed=0)
    steps = [steering.step(NUMBERS[:, i]).log_weights for i in range(3)]
    return [
        *steps,
        resample(NUMBERS, seed=1).ancestors,
        sample_without_replacement(NUMBERS, 3, seed=1).weights,
    ]


DENSE = DenseDecoder(DenseConfig(StackConfig(16, 1, 2), vocab_size=20, max_tokens=64))
CAT = CompressAttendTransformer(
    CATConfig(StackConfig(16, 1, 2), StackConfig(16, 1, 2), vocab_size=20, max_tokens=64)
)


def models() -> list[torch.Tensor]:
    prompt = TOKENS[:, :5] - 10
    return [
        DENSE.generate(prompt, 9, temperature=0, lengths=[5, 3]),
        CAT.generate(prompt, 9, chunk_size=4, temperature=0, lengths=[5, 3]),
        CAT.generate(prompt, 9, chunk_size=4, temperature=0, draft_chunk_size=16),
    ]


PARTS = {
    "pages": lambda: pages(torch.float32),
    "int8 pages": lambda: pages(torch.int8),
    "unmasking": unmasking,
    "particles": particles,
    "models": models,
}


@pytest.mark.parametrize("part", PARTS)
def test_the_default_device_is_not_where_the_host_keeps_its_tables(part):
    expected = PARTS[part]()
    with torch.device("meta"):
        torch.testing.assert_close(PARTS[part](), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_the_default_dtype_is_not_that_of_statistics_and_scales(part, dtype):
    expected = PARTS[part]()
    torch.set_default_dtype(dtype)
    try:
        found = PARTS[part]()
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
