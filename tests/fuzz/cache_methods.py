"""Arguments that fit together: pools, caches and what chooses the tokens that stay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fuzz.call import Call
from torch_winnow import kvcache
from torch_winnow.kvcache import BlockPool, PagedKVCache

Maker = Callable[[Call], dict[str, Any]]
LAYERS, HEADS, DIM, BLOCK, BLOCKS = 2, 2, 3, 4, 12


def pool_options(call: Call) -> dict[str, Any]:
    return {
        "num_blocks": call.pick((BLOCKS, 3)),
        "num_layers": LAYERS,
        "num_kv_heads": HEADS,
        "head_dim": DIM,
        "block_size": BLOCK,
        "dtype": call.pick((torch.float32, torch.float32, torch.bfloat16, torch.int8)),
        "value_head_dim": call.pick((None, DIM)),
        "summaries": call.pick((None, "minmax", "mean")),
        "key_bias": call.pick((False, True)),
        "device": "cpu",
    }


def stored(call: Call, pool: BlockPool, tokens: int, rows: int) -> dict[str, Any]:
    dtype = torch.float32 if pool.dtype == torch.int8 else pool.dtype
    return {name: call.floats(rows, HEADS, tokens, DIM, dtype=dtype) for name in ("key", "value")}


def cache(call: Call, **options: Any) -> PagedKVCache:
    """Up to three rows, of tokens that every layer has stored."""
    pool = BlockPool(**(pool_options(call) | {"num_blocks": BLOCKS} | options))
    made = PagedKVCache(pool, call.size(3))
    tokens = stored(call, pool, call.size(6), len(made.seq_lens))
    for layer in range(LAYERS):
        made.append(layer, **tokens)
    return made


def length_of(made: PagedKVCache) -> int:
    return max(made.seq_lens.tolist(), default=0)


def append(call: Call) -> dict[str, Any]:
    made = cache(call)
    rows, tokens = made.batch_size, call.size(9)
    lengths = call.pick((None, [tokens] * rows, torch.full((rows,), tokens)))
    new = stored(call, made.pool, tokens, rows)
    return {"self": made, "layer": call.size(LAYERS - 1), "lengths": lengths} | new


def write(call: Call) -> dict[str, Any]:
    made = cache(call)
    positions = call.indices(made.batch_size, 2, below=length_of(made))
    new = stored(call, made.pool, 2, made.batch_size)
    return {"self": made, "layer": call.size(LAYERS - 1), "positions": positions} | new


def compact(call: Call) -> dict[str, Any]:
    made = cache(call)
    keep = torch.arange(length_of(made))[:: call.pick((1, 2))]
    return {"self": made, "keep": keep.expand(made.batch_size, -1).clone()}


def of_rows(
    argument: str, below: Callable[[PagedKVCache], int]
) -> Callable[[Call], dict[str, Any]]:
    """A method that takes a list with one integer per row."""

    def make(call: Call) -> dict[str, Any]:
        made = cache(call)
        values = call.indices(made.batch_size, below=below(made))
        return {"self": made, argument: call.pick((values, values.tolist()))}

    return make


def prefix(call: Call) -> dict[str, Any]:
    made = cache(call)
    ids = call.indices(length_of(made), below=3)
    return {"self": made, "token_ids": call.pick((ids, ids.tolist())), "row": call.size(2)}


def matched(call: Call) -> dict[str, Any]:
    arguments = prefix(call)
    made = arguments["self"]
    return arguments | {"self": PagedKVCache(made.pool, call.size(2))}


def votes(call: Call) -> dict[str, Any]:
    tokens = call.size(8)
    mass = torch.rand(call.size(2), HEADS, tokens)
    return {"mass": mass, "seq_lens": call.indices(len(mass), below=tokens + 1)}


def h2o_positions(call: Call) -> dict[str, Any]:
    return votes(call) | {"heavy": call.size(3), "recent": call.size(3)}


def snapkv_positions(call: Call) -> dict[str, Any]:
    sizes = {"capacity": 3 + call.size(3), "window": call.size(3), "kernel_size": 3}
    return votes(call) | sizes | {"pooling": call.pick(("avg", "max"))}


def similar_runs(call: Call) -> dict[str, Any]:
    key = call.floats(call.size(2), HEADS, call.size(6), DIM)
    lengths = call.indices(len(key), below=key.shape[2] + 1)
    return {"key": key, "lengths": lengths, "threshold": 0.5, "recent": call.size(2)}


def merge_runs(call: Call) -> dict[str, Any]:
    arguments = similar_runs(call)
    key = arguments["key"]
    runs = kvcache.similar_runs(**arguments)
    bias = call.maybe(lambda: torch.randn(key.shape[:3]))
    return {"key": key, "value": key + 1, "runs": runs, "key_bias": bias, "mass": None}


def merge_similar(call: Call) -> dict[str, Any]:
    made = cache(call, key_bias=True)
    return {"cache": made, "threshold": 0.5, "recent": call.size(2), "mass": None}


def state_of(made: Any) -> Any:
    """What a refused call must leave as it was."""
    if isinstance(made, BlockPool):
        return made.num_blocks, made.num_free_blocks
    if isinstance(made, PagedKVCache):
        return made.block_table.tolist(), made.seq_lens.tolist(), state_of(made.pool)
    return None


def of_pool(argument: str) -> Maker:
    return lambda call: {"self": BlockPool(**pool_options(call)), argument: call.size(20)}


FUNCTIONS: dict[str, tuple[Callable[..., Any], Maker]] = {
    "BlockPool": (BlockPool, pool_options),
    "BlockPool.grow": (BlockPool.grow, of_pool("num_blocks")),
    "BlockPool.num_owners": (BlockPool.num_owners, of_pool("block")),
    "PagedKVCache": (
        PagedKVCache,
        lambda call: {"pool": BlockPool(**pool_options(call)), "batch_size": call.size(3)},
    ),
    "PagedKVCache.append": (PagedKVCache.append, append),
    "PagedKVCache.write": (PagedKVCache.write, write),
    "PagedKVCache.compact_": (PagedKVCache.compact_, compact),
    "PagedKVCache.fork": (PagedKVCache.fork, of_rows("parents", lambda c: c.batch_size)),
    "PagedKVCache.permute_": (PagedKVCache.permute_, of_rows("ancestors", lambda c: c.batch_size)),
    "PagedKVCache.truncate_": (PagedKVCache.truncate_, of_rows("lengths", length_of)),
    "PagedKVCache.free": (PagedKVCache.free, of_rows("rows", lambda c: c.batch_size)),
    "PagedKVCache.retained_blocks": (
        PagedKVCache.retained_blocks,
        of_rows("rows", lambda c: c.batch_size),
    ),
    "PagedKVCache.marginal_blocks": (
        PagedKVCache.marginal_blocks,
        of_rows("kept", lambda c: c.batch_size),
    ),
    "PagedKVCache.register_prefix": (PagedKVCache.register_prefix, prefix),
    "PagedKVCache.match_prefix": (PagedKVCache.match_prefix, matched),
    "h2o_positions": (kvcache.h2o_positions, h2o_positions),
    "snapkv_positions": (kvcache.snapkv_positions, snapkv_positions),
    "fastkv_positions": (kvcache.fastkv_positions, snapkv_positions),
    "similar_runs": (kvcache.similar_runs, similar_runs),
    "merge_runs": (kvcache.merge_runs, merge_runs),
    "merge_similar_": (kvcache.merge_similar_, merge_similar),
}
