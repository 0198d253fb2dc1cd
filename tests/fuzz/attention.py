"""Arguments that fit together: the attention operators."""

from __future__ import annotations

from typing import Any

import torch

from fuzz.call import Call


def attention(call: Call) -> dict[str, Any]:
    batch, heads, group = call.size(2), call.size(2), call.pick((1, 2))
    tokens, dim = call.size(9), call.pick((0, 1, 5, 16))
    return {
        "query": call.floats(batch, heads * group, tokens, dim),
        "key": call.floats(batch, heads, tokens, dim),
        "value": call.floats(batch, heads, tokens, dim),
        "scale": call.maybe(lambda: 0.3),
    }


def cat_attention(call: Call) -> dict[str, Any]:
    return attention(call) | {"block_size": call.pick((1, 2, 4, 100))}


def block_diagonal_attention(call: Call) -> dict[str, Any]:
    return cat_attention(call) | {"causal": call.pick((True, False))}


def chunk_attention(call: Call) -> dict[str, Any]:
    arguments = attention(call)
    batch, heads, tokens, dim = arguments["key"].shape
    packed = batch == 1 and call.pick((True, False))
    return arguments | {
        "slot_key": call.floats(batch, heads, tokens, dim),
        "slot_value": call.floats(batch, heads, tokens, dim),
        "chunk_size": call.pick((1, 2, 4, 100)),
        "slots_per_chunk": call.pick((1, 2)),
        "initial_slots": call.pick((0, 1, 2)),
        "lookback": call.pick((0, 1)),
        "cu_seqlens": torch.tensor([0, tokens // 2, tokens]) if packed else None,
    }


def merge_attention(call: Call) -> dict[str, Any]:
    shape = (call.size(2), call.size(2), call.size(5), call.pick((0, 1, 5, 16)))
    parts = call.pick((1, 2, 3))
    return {
        "outs": [call.floats(*shape) for _ in range(parts)],
        "lses": [call.floats(*shape[:-1], dtype=call.statistics) for _ in range(parts)],
    }


def merge_attention_backward(call: Call) -> dict[str, Any]:
    arguments = merge_attention(call)
    out, lse = arguments["outs"][0], arguments["lses"][0]
    return arguments | {"grad_out": out * 2, "grad_lse": lse * 2, "out": out + 1, "lse": lse + 1}


def gradients(call: Call, arguments: dict[str, Any]) -> dict[str, Any]:
    query = arguments["query"]
    lse = torch.randn(query.shape[:-1], dtype=call.statistics)
    new = {"grad_out": query * 2, "grad_lse": lse * 2, "out": query + 1, "lse": lse}
    return new | arguments


def cat_attention_backward(call: Call) -> dict[str, Any]:
    return gradients(call, cat_attention(call))


def chunk_attention_backward(call: Call) -> dict[str, Any]:
    return gradients(call, chunk_attention(call))


def block_diagonal_attention_backward(call: Call) -> dict[str, Any]:
    return gradients(call, block_diagonal_attention(call))
