"""Every message that a user can meet names the argument, what came and what is accepted.

The messages are read from the sources (``error_messages.py``), so that a new one is held to this at
once. What the tests of refusals elsewhere do not raise is raised here, mostly by calling operators
without the checks of their wrappers: ``pytest --every-error`` of the whole suite fails on a message
that no test has raised.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch

import error_messages
import torch_winnow as w
from torch_winnow import _core
from torch_winnow.models import CATConfig, MaskedDiffusion, MaskedDiffusionConfig, StackConfig
from torch_winnow.models.training import Recipe, fit

MESSAGES = error_messages.messages()
OP = torch.ops.winnow
NAME = re.compile(r"(\{\}|[A-Za-z_.]+(\[(\{\}|0)\])?)(, \w+)*: ")

# What no argument of a call is to blame for, or a state of things: what happened and what to do.
STATES = (
    "module 'torch_winnow' has no attribute",
    "torch-winnow needs torch 2.11",
    "torch_winnow: the compiled operators",
    "torch_winnow.integrations.transformers: needs transformers 5",
    "linear_logit_stats() got an unexpected keyword argument",
    "training diverged",
    "{}: {}",  # an error of CUDA; quantised.h, which says what is expected and what came
    "{}",  # BlockPoolExhausted, with counts
    "{}: forward-mode differentiation",
    "{} is differentiable once",
    "{}: requires a gradient, but",
    "{}: the last dimension must be contiguous",
    "{}: belongs to one step",
    "{}: follows from the model",
    "{}: needs the logits themselves",
    "{}: score_span sets or cannot use it",
    "PagedKVCache: ",
    "WinnowCache: ",
    "attention_mask: shows columns",
    "block: cannot {} block {}, which is free",
    "block_indices: the size of their blocks is not known",
    "cache: every layer must have stored",
    "callback: expected a {} to run inside",
    "config: layer {} is {}, and pages hold",
    "key: row {} would hold more than",
    "model: at step {} every masked position",
    "output_attentions: ",
    "progress: expected tqdm to be installed",
    "reward_on: 'clean' needs the predicted clean sample",
    "rows: row {} is already free",
    "state: ",
    "step: ",
    "token_ids: block {} of row {} is registered with other tokens",
    "uniforms: accepted for",
    "{}: expected None with vocab_start, because",
)
# Guards behind other checks, and what takes tensors on several devices.
OUT_OF_REACH = ("expected a floating dtype, got {}", "expected every tensor on cuda:{}")


def is_state(text: str) -> bool:
    return any(text == s if set(s) <= set("{}: ") else text.startswith(s) for s in STATES)


def test_the_sources_are_read():
    texts = {message.text for message in MESSAGES}
    assert len(MESSAGES) > 400
    assert "seed: expected either a seed or a generator, got both" in texts
    assert "attention: expected" not in texts
    assert "sink_blocks: expected at least 0, got {}" in texts


def test_messages_name_the_argument_what_came_and_what_is_accepted():
    for message in MESSAGES:
        text = message.text
        if is_state(text) or text.startswith(OUT_OF_REACH):
            continue
        assert NAME.match(text), message
        assert "expected" in text, message
        assert "got" in text, message
        assert not text.endswith((".", "!", " ")), message


def floats(*shape: int) -> torch.Tensor:
    return torch.zeros(shape)


def integers(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


def absent(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Of a shape without elements, so that the other lengths may be anything."""
    return torch.empty(shape, dtype=dtype)


SEED = torch.tensor(0)
STEP = (floats(2, 2, 4, 8),) * 3  # query, key, value: 2 sequences, 2 heads, 4 tokens
PAGES = floats(3, 2, 4, 8)  # 3 blocks of 4 tokens
WRITE = {
    "key_pages": PAGES,
    "value_pages": PAGES,
    "key": floats(2, 2, 1, 8),
    "value": floats(2, 2, 1, 8),
    "block_table": integers(2, 1),
    "positions": integers(2, 1, dtype=torch.int64),
}
RESAMPLE = {
    "log_weights": floats(2, 4),
    "scheme": "systematic",
    "num_samples": None,
    "ess_threshold": None,
    "keep_slots": False,
    "mask": None,
    "uniforms": None,
    "pinned": None,
    "seed": 0,
    "seed_tensor": None,
}
MERGE = {
    "parts": [floats(2, 1)],
    "starts": [0],
    "counts": [4],
    "temperature": 1.0,
    "seed": None,
    "raw": False,
    "has_target": False,
    "has_previous": False,
}
SELECT = (floats(1, 4), torch.ones(1, 4, dtype=torch.bool))
DIFFUSION = MaskedDiffusionConfig(StackConfig(width=8, depth=1, heads=2), vocab_size=4)


def write(**changed: torch.Tensor) -> Callable[[], object]:
    return lambda: OP.paged_write_(**(WRITE | changed))


def resample(**changed: object) -> Callable[[], object]:
    return lambda: OP.resample(**(RESAMPLE | changed))


def merge(**changed: object) -> Callable[[], object]:
    return lambda: OP.merge_logit_stats(**(MERGE | changed))


def backward(lse: torch.Tensor) -> object:
    grad_out, grad_lse = floats(2, 2, 4, 8), floats(2, 2, 4)
    return OP.cat_attention_backward(grad_out, grad_lse, *STEP, grad_out, lse, 2, None)


def diverge() -> object:
    model = torch.nn.Linear(2, 2)
    return fit(model, lambda step: model.weight.sum() * float("nan"), Recipe(steps=1))


CASES: dict[str, Callable[[], object]] = {
    # attention
    "lse: expected (B, Hq, N) as in query, (2, 2, 4, 8), got (2, 2, 3)": lambda: backward(
        floats(2, 2, 3)
    ),
    "grad_out: expected shape (2, 3), got (2, 2)": lambda: OP.merge_attention_backward(
        floats(2, 2), floats(2), [floats(2, 3)], [floats(2)], floats(2, 3), floats(2)
    ),
    # kvcache
    "key: expected (B, Hkv, T, D) with Hkv=2 and D=8 as in key_pages": write(
        key=floats(2, 3, 1, 8)
    ),
    "value_pages: expected (num_blocks, Hkv, block_size, Dv) as in key": write(
        value_pages=floats(4, 2, 4, 8)
    ),
    "value: expected shape like key up to the last dimension": write(value=floats(1, 2, 1, 8)),
    "block_table: expected (B, max_blocks) with B=2 as in key, got (1, 1)": write(
        block_table=integers(1, 1)
    ),
    "positions: expected (B, T) with T=1 as in key, got (2, 2)": write(
        positions=integers(2, 2, dtype=torch.int64)
    ),
    "key_pages: expected a block_size of at least 1": lambda: OP.block_summaries(
        floats(3, 2, 0, 8), integers(1, 1), integers(1)
    ),
    "pages: expected a block_size of at least 1": lambda: OP.compact_pages_(
        floats(1, 3, 2, 0, 8), integers(1, 1), integers(1, 1, 2, 1)
    ),
    "value_pages: expected (num_layers, num_blocks, Hkv, block_size, Dv)": lambda: OP.copy_blocks_(
        PAGES[None], floats(1, 4, 2, 4, 8), *[integers(1, dtype=torch.int64)] * 2
    ),
    "target: expected (copies,) = (2,) as in source, got (1,)": lambda: OP.copy_blocks_(
        PAGES[None], PAGES[None], *[integers(n, dtype=torch.int64) for n in (2, 1)]
    ),
    "key_bias: expected (num_blocks, Hkv, block_size) as in key_pages": lambda: OP.attention_mass(
        floats(1, 2, 1, 8),
        PAGES,
        integers(1, 1),
        integers(1),
        floats(1, 2, 1),
        key_bias=floats(3, 2, 5),
    ),
    "recent_blocks: expected at least 0, got -1": lambda: w.kvcache.select_blocks(
        floats(1, 1, 4), 2, seq_lens=integers(1), block_size=4, recent_blocks=-1
    ),
    "k: expected fewer than 2^31 blocks, got 2147483648": lambda: OP.select_blocks(
        floats(1, 1, 4), 1 << 31, integers(1), 4
    ),
    "key: row 0 would hold more than 2**31 tokens": lambda: _core.CacheTable(
        _core.BlockPool(1), 1, 1, 4
    ).append(0, (1 << 31) + 1, None, 0),
    # resampling
    "state: expected memory of its own to gather in place": lambda: OP.gather_particles_(
        floats(1, 2).expand(3, 2), integers(3, dtype=torch.int64), 0
    ),
    "seed: expected a 0-dim tensor, got shape (1,)": resample(seed_tensor=SEED[None]),
    "log_weights: expected fewer than 2^31 particles": resample(log_weights=absent(0, 1 << 31)),
    "pinned: expected one particle per population (...)": resample(
        pinned=integers(3, dtype=torch.int64)
    ),
    "beta: expected a number for each population of log_likelihood": lambda: OP.next_temperature(
        floats(2, 4), floats(3), 0.5, 1.0, None
    ),
    "rows, count: expected no negative numbers, got -1 and 1": lambda: OP.uniforms(SEED, -1, 1),
    "rows, count: expected at most 2^40 numbers": lambda: OP.uniforms(SEED, 1 << 30, 1 << 30),
    # unmasking
    "logits: expected a part of at most": lambda: w.unmasking.logit_stats(
        absent(0, 1 << 62), vocab_start=0
    ),
    "parts: expected at least one, with a start and a count for each": merge(starts=[0, 1]),
    "parts: expected float32 or float64, got bfloat16": merge(parts=[floats(2, 1).bfloat16()]),
    "starts: expected 0 to 2^62 in all of them, got -1": merge(starts=[-1]),
    "counts: expected 0 to": merge(counts=[-1]),
    "parts: expected adjoining parts of the vocabulary in order": merge(
        parts=[floats(2, 8)] * 2, starts=[0, 5], counts=[4, 4]
    ),
    "parts: expected (..., ": merge(),
    "order: expected 0 to 3, got 4": lambda: OP.select_positions(
        *SELECT, 4, 0, 0.5, -1, None, None, None
    ),
    "criterion: expected 0 to 4, got 5": lambda: OP.select_positions(
        *SELECT, 0, 5, 0.5, -1, None, None, None
    ),
    "limit: expected at least -1, got -2": lambda: OP.select_positions(
        *SELECT, 0, 0, 0.5, -2, None, None, None
    ),
    "linear_logit_stats() got an unexpected keyword argument 'colour'": (
        lambda: w.unmasking.linear_logit_stats(floats(1, 2), floats(4, 2), colour=1)
    ),
    "answer: expected (n,) token ids, got (1, 2) torch.int64": lambda: w.unmasking.Template(
        [[1], ("answer", 2)], mask_id=9
    ).fill(answer=integers(1, 2, dtype=torch.int64)),
    # models
    'projection: expected "last" or "interpolated", got \'first\'': lambda: CATConfig(
        StackConfig(width=8, depth=1, heads=2), projection="first"
    ),
    "most: expected a share in (0, 1], got 2.0": lambda: MaskedDiffusion(DIFFUSION).loss(
        integers(1, 4), most=2.0
    ),
    "training diverged: the loss of step 0 is nan": diverge,
}


@pytest.mark.parametrize("text", CASES)
def test_refusals_of_the_operators_themselves(text):
    with pytest.raises((ValueError, TypeError, FloatingPointError)) as error:
        CASES[text]()
    assert str(error.value).startswith(text)
    assert any(message.pattern.fullmatch(str(error.value)) for message in MESSAGES)


def test_refusals_of_the_integration():
    transformers = pytest.importorskip("transformers", minversion="5")
    from torch_winnow.integrations.transformers import BlockSparse, WinnowCache
    from torch_winnow.integrations.transformers.dense import block_mask, dense_attention

    cache = WinnowCache(transformers.LlamaConfig(num_hidden_layers=1))
    with pytest.raises(RuntimeError, match="WinnowCache: layers share one table, call reset"):
        cache.layers[0].reset()
    with pytest.raises(RuntimeError, match="WinnowCache: there is no pool before"):
        _ = cache.storage.pool
    with pytest.raises(RuntimeError, match="WinnowCache: there are no pages before"):
        _ = cache.storage.pages
    with pytest.raises(ValueError, match="pool: expected a BlockPool or None, got 3"):
        WinnowCache(transformers.LlamaConfig(), pool=3)
    with pytest.raises(ValueError, match="summary: expected 'minmax' or 'mean', got 'max'"):
        BlockSparse(k=2, summary="max")
    sparse = transformers.LlamaConfig(num_hidden_layers=1)
    sparse.layer_types = ["minimax_m3_sparse"]
    with pytest.raises(ValueError, match="cache keeps the keys of its indexer too"):
        WinnowCache(sparse).match_prefix(integers(1, 4))
    query, key, value = STEP
    with pytest.raises(ValueError, match="position_bias: expected None together with a softcap"):
        dense_attention(
            *(torch.nn.Module(), query, key, value, None, 0.0, None, True, 50.0, None),
            position_bias=query,
        )
    with pytest.raises(ValueError, match=r"block_indices: expected \(B, H, T, K\) with H dividing"):
        block_mask(integers(2, 3, 4, 1), 4, query, key, None, True)


def test_refusals_of_the_callback():
    pytest.importorskip("diffusers")
    from torch_winnow.integrations.diffusers import FKSteeringCallback

    steering = w.resampling.FKSteering()
    callback = FKSteeringCallback(steering, lambda x: x.sum(1), 2, carry=("mask",))
    with pytest.raises(ValueError, match=r"carry: expected mask to have a multiple of 4 rows, got"):
        callback._carried({"latents": floats(4, 2), "mask": floats(3)})
