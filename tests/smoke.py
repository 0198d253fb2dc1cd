"""One op per family, without a test framework: ``python tests/smoke.py``.

For machines where only the wheel is installed: an emulated processor, another torch release.
"""

from __future__ import annotations

import torch

import torch_winnow
from torch_winnow import attention, kvcache, reference, resampling, unmasking


def main() -> None:
    print(torch_winnow.build_info())
    torch.manual_seed(0)

    query, key, value = torch.randn(3, 1, 2, 50, 16)
    torch.testing.assert_close(
        attention.cat_attention(query, key, value, block_size=9),
        reference.cat_attention(query, key, value, block_size=9),
        rtol=1e-4,
        atol=1e-5,
    )

    log_weights = torch.randn(4, 33)
    particles = resampling.resample(log_weights, seed=1)
    assert torch.equal(particles.offspring.sum(-1), torch.full((4,), 33))

    logits = torch.randn(2, 5, 999)
    torch.testing.assert_close(
        unmasking.logit_stats(logits).entropy,
        reference.logit_stats(logits).entropy,
        rtol=1e-4,
        atol=1e-4,
    )

    pool = kvcache.BlockPool(
        8, num_layers=1, num_kv_heads=2, head_dim=16, block_size=16, dtype=torch.float32
    )
    cache = kvcache.PagedKVCache(pool, 1)
    cache.append(0, key, value)
    arguments = (pool.key_pages[0], pool.value_pages[0], cache.block_table, cache.seq_lens)
    torch.testing.assert_close(
        kvcache.paged_attention(query, *arguments),
        reference.paged_attention(query, *arguments),
        rtol=1e-4,
        atol=1e-5,
    )
    print("attention, resampling, unmasking and kvcache run")


if __name__ == "__main__":
    main()
