"""Decoding away from the CPU: lengths stay on the host, and no operator mixes the two.

Without a GPU the model lies on the meta device, which only knows shapes, and its cache on the host.
"""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from torch_winnow.kvcache import BlockPool, PagedKVCache
from torch_winnow.models import (
    CATConfig,
    CompressAttendTransformer,
    DenseConfig,
    DenseDecoder,
    StackConfig,
    decoding,
)

SMALL = StackConfig(width=16, depth=1, heads=2)
# What takes an index from the host, or carries something over.
CROSSING = ("aten.index.Tensor", "aten.index_put_.default", "aten._to_copy.default")


class OneDevice(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        devices = {x.device.type for x in tensors if x.dim() > 0}
        assert len(devices) <= 1 or str(func) in CROSSING, f"{func} of {devices}"
        return func(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def _cache_on_the_host(monkeypatch):
    append = PagedKVCache.append
    monkeypatch.setattr(
        decoding, "BlockPool", lambda *a, **k: BlockPool(*a, **k | {"device": "cpu"})
    )
    monkeypatch.setattr(decoding, "paged_attention", lambda query, *_: torch.empty_like(query))
    monkeypatch.setattr(
        PagedKVCache,
        "append",
        lambda cache, layer, key, value, **options: append(
            cache, layer, torch.zeros(key.shape), torch.zeros(value.shape), **options
        ),
    )


@pytest.mark.parametrize("separator", [True, False, None], ids=["CAT", "CAT, plain", "dense"])
def test_no_operator_mixes_devices(separator):
    options = {}
    if separator is None:
        model = DenseDecoder(DenseConfig(SMALL, max_tokens=64))
    else:
        model = CompressAttendTransformer(
            CATConfig(SMALL, SMALL, (4,), separator=separator, max_tokens=64)
        )
        options = {"chunk_size": 4}
    model = model.to("meta")
    text = torch.zeros((2, 9), dtype=torch.int64, device="meta")
    with OneDevice():
        started = model.start(
            text, model.block_pool(2, 40, draft_tokens=6, **options), lengths=[3, 9], **options
        )
        for _ in range(4):
            started.step(text[:, 0])
        assert started.extend(text[:, :6], [5, 6]).device.type == "meta"
        started.truncate_([8, 18])
        started.fork_([0, 1, 1])
        started.permute_([1, 0, 2])
        assert started.logits.device.type == "meta"
        assert started.lengths.tolist() == [18, 8, 18]
