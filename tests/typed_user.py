"""What a user with ``mypy --strict`` sees of the public names: ``make lint`` checks this file.

A test runs it as well, so that what is promised to the type checker is what comes out.
"""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import assert_type

import torch_winnow
from torch_winnow import attention, kvcache, resampling, unmasking
from torch_winnow.models import CATConfig, CompressAttendTransformer, StackConfig


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    out = attention.cat_attention(query, key, value, block_size=4)
    assert_type(out, Tensor)
    both = attention.cat_attention(query, key, value, block_size=4, return_lse=True)
    assert_type(both, tuple[Tensor, Tensor])
    merged, lse = attention.merge_attention([out, both[0]], [both[1], both[1]])
    return merged * lse.exp().unsqueeze(-1)


def steer(rewards: Tensor, state: dict[str, Tensor]) -> dict[str, Tensor]:
    steering = resampling.FKSteering("max", lmbda=2.0, seed=0)
    result = steering.step(rewards)
    assert_type(result, resampling.Resampling)
    assert_type(result.ancestors, Tensor)
    moved: dict[str, Tensor] = resampling.gather_particles(state, result.ancestors)
    return moved


def decode(logits: Tensor, tokens: Tensor, mask_id: int) -> Tensor:
    stats = unmasking.logit_stats(logits, temperature=0.7, seed=1)
    assert_type(stats.entropy, Tensor)
    rule = unmasking.EntropyThreshold(0.3)
    step = unmasking.unmask_step_(tokens, logits, mask_id=mask_id, rule=rule)
    assert_type(step.count, Tensor)
    result = unmasking.generate(lambda x: logits, tokens, mask_id=mask_id, rule=unmasking.TopK(1))
    assert_type(result, unmasking.GenerateResult)
    return result.tokens


def cache(tokens: Tensor) -> Tensor:
    pool = kvcache.BlockPool(
        8, num_layers=1, num_kv_heads=1, head_dim=4, block_size=4, dtype=torch.float32
    )
    rows = kvcache.PagedKVCache(pool, batch_size=1)
    try:
        rows.append(0, tokens, tokens)
    except kvcache.BlockPoolExhausted as full:
        assert_type(full.needed, int)
    fork = rows.fork([0, 0])
    assert_type(fork, kvcache.PagedKVCache)
    return kvcache.paged_attention(
        tokens[:, :, -1:].expand(2, -1, -1, -1),
        pool.key_pages[0],
        pool.value_pages[0],
        fork.block_table,
        fork.seq_lens,
    )


def describe() -> str:
    info = torch_winnow.build_info()
    assert_type(info.capabilities, tuple[str, ...])
    return f"{info.version} on {info.cpu_capability}"


def model() -> CompressAttendTransformer:
    return CompressAttendTransformer(CATConfig(StackConfig(width=16, depth=1, heads=2)))
