"""Arguments that fit together: the kvcache operators."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fuzz.call import Call

BLOCK = 4


def cache(call: Call) -> dict[str, Any]:
    batch, heads, dim, width = call.size(2), call.size(2), call.pick((0, 1, 5, 16)), call.size(3)
    pool = batch * width + 1
    return {
        "key_pages": call.floats(pool, heads, BLOCK, dim),
        "value_pages": call.floats(pool, heads, BLOCK, dim),
        "block_table": torch.randperm(pool, dtype=torch.int32)[: batch * width].view(batch, width),
        "seq_lens": call.indices(batch, below=width * BLOCK + 1, dtype=torch.int32),
    }


def query_of(call: Call, arguments: dict[str, Any]) -> Tensor:
    pages = arguments["key_pages"]
    rows = len(arguments["block_table"])
    return call.floats(rows, pages.shape[1] * call.pick((1, 2)), call.size(3), pages.shape[3])


def masked_cache(call: Call) -> dict[str, Any]:
    arguments = cache(call)
    return arguments | {
        "query": query_of(call, arguments),
        "causal": call.pick((True, False)),
        "window": call.pick((None, 1, 5)),
        "sinks": call.pick((0, 1, 5)),
        "scale": call.maybe(lambda: 0.3),
        "key_bias": call.maybe(
            lambda: call.floats(*arguments["key_pages"].shape[:3], dtype=call.statistics)
        ),
    }


def quantised(arguments: dict[str, Any], names: tuple[str, ...] = ("key", "value")) -> None:
    for name in names:
        pages = arguments[f"{name}_pages"]
        arguments[f"{name}_pages"] = (pages * 20).to(torch.int8)
        arguments[f"{name}_scales"] = torch.rand(pages.shape[:2])


def paged_attention(call: Call) -> dict[str, Any]:
    arguments = masked_cache(call)
    batch, width = arguments["block_table"].shape
    if call.pick((True, False)):
        quantised(arguments)
    listed = call.indices(batch, 2, below=width, dtype=torch.int32).sort(1).values
    return arguments | {"block_indices": call.maybe(lambda: listed)}


def attention_mass(call: Call) -> dict[str, Any]:
    arguments = masked_cache(call)
    del arguments["value_pages"]
    return arguments | {"lse": call.floats(*arguments["query"].shape[:3], dtype=call.statistics)}


def paged_write_(call: Call) -> dict[str, Any]:
    arguments = cache(call)
    del arguments["seq_lens"]
    _, heads, _, dim = arguments["key_pages"].shape
    batch, width = arguments["block_table"].shape
    tokens = call.size(3)
    return arguments | {
        "key": call.floats(batch, heads, tokens, dim),
        "value": call.floats(batch, heads, tokens, dim),
        "positions": call.indices(batch, tokens, below=width * BLOCK),
    }


def paged_quantise_(call: Call) -> dict[str, Any]:
    arguments = paged_write_(call)
    quantised(arguments)
    return arguments


def copy_blocks_(call: Call) -> dict[str, Any]:
    pages = call.floats(call.size(2), 4, call.size(2), BLOCK, call.size(3))
    both = torch.randperm(4)
    return {
        "key_pages": pages,
        "value_pages": pages + 1,
        "source": both[:2],
        "target": both[2:],
    }


def compact_pages_(call: Call) -> dict[str, Any]:
    layers, heads, batch, width = call.size(2), call.size(2), call.size(2), call.size(2)
    table = torch.randperm(batch * width + 1, dtype=torch.int32)[: batch * width]
    kept = torch.arange(width * BLOCK)[:: call.pick((1, 3))]
    return {
        "pages": call.floats(layers, batch * width + 1, heads, BLOCK, 3),
        "block_table": table.view(batch, width),
        "keep": kept.expand(layers, batch, heads, -1).clone(),
    }


def block_summaries(call: Call) -> dict[str, Any]:
    arguments = cache(call) | {"minmax": call.pick((True, False))}
    if call.pick((True, False)):
        quantised(arguments, ("key",))
    del arguments["value_pages"]
    return arguments


def update_block_summaries_(call: Call) -> dict[str, Any]:
    arguments = block_summaries(call)
    pages, table = arguments["key_pages"], arguments["block_table"]
    both = (2,) if arguments.pop("minmax") else ()
    dtype = torch.float32 if "key_scales" in arguments else call.statistics
    return arguments | {
        "summaries": call.floats(*pages.shape[:2], *both, pages.shape[3], dtype=dtype),
        "positions": call.indices(len(table), call.size(3), below=BLOCK),
    }


def score_blocks(call: Call) -> dict[str, Any]:
    arguments = cache(call)
    query, pages = query_of(call, arguments), arguments["key_pages"]
    both = call.pick(((), (2,)))
    summaries = call.floats(*pages.shape[:2], *both, pages.shape[3], dtype=call.statistics)
    if call.pick((True, False)):
        return {"query": query, "summaries": summaries, "block_table": arguments["block_table"]}
    shape = (*arguments["block_table"].shape, *summaries.shape[1:])
    listed = call.floats(*shape, dtype=call.statistics).transpose(1, 2)
    return {"query": query, "summaries": listed}


def select_options(call: Call, batch: int) -> dict[str, Any]:
    return {
        "k": call.size(4) + 2,
        "seq_lens": call.indices(batch, below=9, dtype=torch.int32),
        "block_size": BLOCK,
        "sink_blocks": call.pick((0, 1)),
        "recent_blocks": call.pick((0, 1)),
    }


def select_blocks(call: Call) -> dict[str, Any]:
    scores = call.floats(call.size(2), call.size(2), call.size(5), dtype=call.statistics)
    return {"scores": scores} | select_options(call, len(scores))


def score_select_blocks(call: Call) -> dict[str, Any]:
    arguments = score_blocks(call)
    return arguments | select_options(call, len(arguments["query"]))
