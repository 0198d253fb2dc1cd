"""Every operator, called with what nobody should pass: it answers, or says which argument is wrong.

Each example starts from arguments that fit together and spoils some of them: dtypes, ranks, sizes,
strides, options, and contents such as block tables and ancestors that point anywhere. Allowed are a
result, which may not depend on strides, and an error that names an argument. Under AddressSanitizer
(see CONTRIBUTING.md) a read or write outside of any argument ends the run too.

``WINNOW_FUZZ_EXAMPLES=5000`` looks longer.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, note, settings
from hypothesis import strategies as st
from torch import Tensor

import torch_winnow  # noqa: F401  (registers the operators)

EXAMPLES = int(os.environ.get("WINNOW_FUZZ_EXAMPLES", "30"))
SCHEMAS = {
    schema.name.removeprefix("winnow::"): schema
    for schema in torch._C._jit_get_all_schemas()
    if schema.name.startswith("winnow::")
}
FLOATING = (torch.float32, torch.float32, torch.bfloat16, torch.float16, torch.float64)
DTYPES = (*FLOATING, torch.int32, torch.int64, torch.int8, torch.bool, torch.complex64)
# None of these is a size that can be allocated and takes long to fill.
INTEGERS = (-(2**63), -(2**31) - 1, -2, -1, 0, 1, 2, 3, 5, 64, 2**62, 2**63 - 1)
NUMBERS = (-1e300, -1.0, -0.0, 0.0, 1e-300, 0.3, 1.0, 7.0, 1e300, float("inf"), float("nan"))
# What speaks of the machinery, not of the call.
INTERNAL = re.compile(r"INTERNAL ASSERT|std::|vector::|basic_string|\.cpp:|\.h:\d|bad_|unknown")


class Call:
    """Draws the arguments of one call."""

    def __init__(self, data: st.DataObject) -> None:
        self.data = data
        self.dtype = self.pick(FLOATING)
        self.statistics = torch.float64 if self.dtype == torch.float64 else torch.float32

    def pick(self, choices: Any) -> Any:
        return self.data.draw(st.sampled_from(choices))

    def size(self, most: int = 4) -> int:
        return self.data.draw(st.integers(0, most))

    def maybe(self, make: Callable[[], Any]) -> Any:
        return make() if self.pick((True, False)) else None

    def floats(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(shape).to(dtype or self.dtype)

    def indices(self, *shape: int, below: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.randint(0, max(below, 1), shape, dtype=dtype)

    def bools(self, *shape: int) -> Tensor:
        return torch.rand(shape) < 0.7

    def seed(self) -> Tensor:
        return torch.tensor(self.pick(INTEGERS))


# Arguments that fit together, operator by operator.


def attention(call: Call) -> dict[str, Any]:
    batch, heads, group = call.size(2), call.size(2), call.pick((1, 2))
    tokens, dim = call.size(9), call.pick((0, 1, 5, 16))
    return {
        "query": call.floats(batch, heads * group, tokens, dim),
        "key": call.floats(batch, heads, tokens, dim),
        "value": call.floats(batch, heads, tokens, dim),
        "scale": call.maybe(lambda: 0.3),
    }


def gradients(call: Call, arguments: dict[str, Any]) -> dict[str, Any]:
    query = arguments["query"]
    lse = torch.randn(query.shape[:-1], dtype=call.statistics)
    new = {"grad_out": query * 2, "grad_lse": lse * 2, "out": query + 1, "lse": lse}
    return new | arguments


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


def weights(call: Call, name: str = "log_weights") -> dict[str, Any]:
    return {name: call.floats(call.size(3), call.size(3), call.size(20))}


def conditional_effective_sample_size(call: Call) -> dict[str, Any]:
    arguments = weights(call)
    return arguments | {"log_increments": torch.randn_like(arguments["log_weights"])}


def next_temperature(call: Call) -> dict[str, Any]:
    arguments = weights(call, "log_likelihood")
    values = arguments["log_likelihood"]
    return arguments | {
        "beta": torch.rand(values.shape[:-1], dtype=call.statistics),
        "target_ess": 0.5,
        "max_beta": 1.0,
        "log_weights": call.maybe(lambda: torch.randn_like(values)),
    }


def resample(call: Call) -> dict[str, Any]:
    arguments = weights(call)
    values = arguments["log_weights"]
    *leading, particles = values.shape
    scheme = call.pick(
        ("systematic", "stratified", "multinomial", "residual", "ssp", "killing", "optimal")
    )
    drawn = {"systematic": leading, "stratified": values.shape, "multinomial": values.shape}
    return arguments | {
        "scheme": scheme,
        "num_samples": call.pick((None, particles, particles + 3)),
        "ess_threshold": call.pick((None, 0.5)),
        "keep_slots": call.pick((True, False)),
        "mask": call.maybe(lambda: call.bools(*values.shape)),
        "uniforms": call.maybe(lambda: torch.rand(drawn[scheme])) if scheme in drawn else None,
        "pinned": call.maybe(lambda: call.indices(*leading, below=particles)),
        "seed": 7,
        "seed_tensor": call.maybe(call.seed),
    }


def sample_without_replacement(call: Call) -> dict[str, Any]:
    arguments = weights(call)
    return arguments | {
        "k": call.size(arguments["log_weights"].shape[-1]),
        "design": call.pick(("gumbel_topk", "conditional_poisson", "pareto")),
        "seed": 7,
        "seed_tensor": call.maybe(call.seed),
    }


def inclusion_probabilities(call: Call) -> dict[str, Any]:
    arguments = weights(call)
    return arguments | {"k": call.size(arguments["log_weights"].shape[-1])}


def trace_ancestors(call: Call) -> dict[str, Any]:
    steps, rows, particles = call.size(3), call.size(3), call.size(6)
    return {
        "ancestors": call.indices(steps, rows, particles, below=particles),
        "indices": call.indices(rows, call.size(3), below=particles),
    }


def uniforms(call: Call) -> dict[str, Any]:
    return {"seed": call.seed(), "rows": call.size(5), "count": call.size(5)}


def gather_particles(call: Call) -> dict[str, Any]:
    rows, particles = call.size(3), call.size(6)
    return {
        "state": call.floats(rows, particles, call.size(3), dtype=call.pick(DTYPES)),
        "ancestors": call.indices(rows, particles, below=particles),
        "dim": call.pick((1, -2)),
    }


def logit_options(call: Call, logits: Tensor) -> dict[str, Any]:
    vocab = logits.shape[-1]
    return {
        "mask": call.maybe(lambda: call.bools(*logits.shape[:-1])),
        "temperature": call.pick((0.0, 0.7, 1.0)),
        "suppress_ids": call.maybe(lambda: call.indices(2, below=vocab)),
        "target_ids": call.maybe(lambda: call.indices(*logits.shape[:-1], below=vocab)),
        "seed": call.maybe(call.seed),
        "raw": call.pick((True, False)),
        "shift": call.pick((True, False)),
    }


def guided_logit_options(call: Call, logits: Tensor) -> dict[str, Any]:
    return logit_options(call, logits) | {
        "previous_logits": call.maybe(lambda: torch.randn_like(logits)),
        "unconditional_logits": call.maybe(lambda: torch.randn_like(logits)),
        "cfg_scale": 0.5,
        "top_k": call.pick((None, 2, 100)),
        "top_p": call.pick((None, 0.9)),
        "min_p": call.pick((None, 0.1)),
    }


def logit_stats(call: Call) -> dict[str, Any]:
    logits = call.floats(call.size(2), call.size(3), call.pick((0, 1, 17, 1100)))
    options = guided_logit_options(call, logits)
    if call.pick((True, False)):
        whole = dict.fromkeys(("top_k", "top_p", "min_p"))
        options |= whole | {"shift": False, "vocab_start": call.pick((0, 1000))}
    keys = call.maybe(lambda: call.indices(*logits.shape[:-1], below=9))
    return {"logits": logits, "row_keys": keys} | options


def merge_logit_stats(call: Call) -> dict[str, Any]:
    rows, counts = call.size(2), [call.pick((0, 1, 17, 2500)) for _ in range(call.pick((1, 2)))]
    starts = [call.pick((0, 1000))]
    starts += [starts[0] + counts[0]] * (len(counts) - 1)
    seed, previous = call.maybe(call.seed), call.pick((True, False))
    parts = []
    for start, count in zip(starts, counts, strict=True):
        logits = call.floats(rows, count)
        made = {"previous_logits": logits * 0.5 if previous else None, "vocab_start": start}
        unused = ("mask", "suppress_ids", "target_ids", "unconditional_logits")
        unused += ("top_k", "top_p", "min_p")
        made |= {"temperature": 1.0, "cfg_scale": 0.0, "seed": seed, "raw": False}
        parts.append(torch.ops.winnow.logit_stats(logits, **made, **dict.fromkeys(unused))[-1])
    return {
        "parts": parts,
        "starts": starts,
        "counts": counts,
        "temperature": 1.0,
        "seed": call.pick((seed, call.seed())),
        "raw": False,
        "has_target": call.pick((True, False)),
        "has_previous": previous,
        "row_keys": call.maybe(lambda: call.indices(rows, below=9)),
    }


def linear_logit_stats(call: Call) -> dict[str, Any]:
    rows, width, vocab = call.size(3), call.size(5), call.pick((0, 1, 17))
    options = logit_options(call, torch.empty(2, rows, vocab))
    return options | {
        "hidden": call.floats(2, rows, width),
        "weight": call.floats(vocab, width),
        "bias": call.maybe(lambda: call.floats(vocab)),
    }


def rule(call: Call) -> dict[str, Any]:
    return {
        "order": call.size(3),
        "criterion": call.size(4),
        "threshold": call.pick(NUMBERS),
        "limit": call.pick((-1, 0, 1, 3)),
    }


def unmask_step_(call: Call) -> dict[str, Any]:
    logits = call.floats(call.size(2), call.size(4), call.pick((0, 1, 17)))
    batch, length, vocab = logits.shape
    step = {
        "tokens": call.indices(batch, length, below=3, dtype=call.pick((torch.int64, torch.int32))),
        "logits": logits,
        "mask_id": call.size(2),
        "window": call.maybe(lambda: call.indices(batch, 2, below=length + 1)),
        "score": call.size(3),
        "order_seed": call.seed(),
    }
    return guided_logit_options(call, logits) | step | rule(call)


def select_positions(call: Call) -> dict[str, Any]:
    batch, length = call.size(3), call.size(6)
    return rule(call) | {
        "score": call.floats(batch, length, dtype=call.statistics),
        "mask": call.bools(batch, length),
        "window": call.maybe(lambda: call.indices(batch, 2, below=length + 1)),
        "at_least": call.maybe(lambda: call.indices(batch, below=3)),
        "seed": call.seed(),
    }


def soft_embedding(call: Call) -> dict[str, Any]:
    vocab, width = call.pick((0, 1, 17)), call.size(5)
    logits = call.floats(call.size(2), call.size(3), vocab)
    return {
        "logits": logits,
        "embedding": call.floats(vocab + call.size(2), width),
        "mask_embedding": call.floats(width),
        "mask": call.maybe(lambda: call.bools(*logits.shape[:-1])),
        "temperature": call.pick((0.0, 0.7)),
        "top_k": call.pick((None, 2)),
        "top_p": call.pick((None, 0.9)),
        "mix": 0.5,
    }


def speculative_verify(call: Call) -> dict[str, Any]:
    batch, drafts, vocab = call.size(2), call.size(4), call.pick((1, 17))
    ordered = call.pick((True, False))
    return {
        "draft_tokens": call.indices(batch, drafts, below=vocab),
        "draft_logits": call.maybe(lambda: call.floats(batch, drafts, vocab)),
        "target_logits": call.floats(batch, drafts + (not ordered), vocab),
        "temperature": call.pick((0.0, 0.7)),
        "lengths": call.maybe(lambda: call.indices(batch, below=drafts + 1)),
        "order": torch.rand(batch, drafts).argsort(1) if ordered else None,
        "seed": call.seed(),
    }


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


ARGUMENTS: dict[str, Callable[[Call], dict[str, Any]]] = {
    name: globals()[name] for name in SCHEMAS if name in globals()
} | {
    "cat_attention_backward": lambda call: gradients(call, cat_attention(call)),
    "chunk_attention_backward": lambda call: gradients(call, chunk_attention(call)),
    "block_diagonal_attention_backward": lambda call: gradients(
        call, block_diagonal_attention(call)
    ),
    "effective_sample_size": weights,
    "log_mean_exp": weights,
    "weight_entropy": weights,
    "gather_particles_": gather_particles,
}


# Spoiling.


def strange_numbers(call: Call, value: Tensor) -> Tensor:
    """Some elements replaced by what an index or a weight should not be."""
    value = value.clone()
    if value.numel() == 0 or value.dtype == torch.bool:
        return value
    choices = INTEGERS
    if value.is_floating_point() or value.is_complex():
        most = torch.finfo(value.dtype).max
        choices = tuple(x for x in NUMBERS if not most < abs(x) < float("inf"))
    elif value.dtype == torch.int32:
        choices = tuple(i for i in INTEGERS if abs(i) < 2**31) + (-(2**31), 2**31 - 1)
    elif value.dtype == torch.int8:
        choices = (-128, -1, 0, 127)
    value.view(-1)[call.size(value.numel() - 1)] = call.pick(choices)
    return value


def spoiled_tensor(call: Call, value: Tensor) -> Any:
    """The same argument in another layout, of another kind, or with other contents."""
    way = call.pick(("contents", "contents", "dtype", "stride", "rank", "size"))
    if way == "contents" and value.is_contiguous():
        return strange_numbers(call, value)
    if way == "dtype":
        return value.to(call.pick(DTYPES))
    if way == "rank":
        return call.pick((value[None], value.flatten(), value[..., None], value.sum()))
    if value.dim() == 0:
        return value
    dim = call.size(value.dim() - 1)
    if way == "size":
        return torch.cat([value, value], dim).narrow(dim, 0, call.size(2 * value.shape[dim]))
    if value.dtype == torch.bool and not value.is_contiguous():
        return value
    padded = torch.cat([value, value], dim)
    return call.pick(
        (
            value.transpose(dim, -1).contiguous().transpose(dim, -1),
            padded.narrow(dim, call.size(value.shape[dim]), value.shape[dim]),
            torch.stack([value, value], dim + 1).flatten(dim, dim + 1)[
                (slice(None),) * dim + (slice(None, None, 2),)
            ],
            value.narrow(dim, 0, 1).expand_as(value) if value.shape[dim] else value,
        )
    )


def spoiled(call: Call, value: Any) -> Any:
    if isinstance(value, Tensor):
        return spoiled_tensor(call, value)
    if isinstance(value, list):
        if call.pick((True, False)):
            return call.pick((value[1:] or value, value + value))
        at = call.size(len(value) - 1)
        return [*value[:at], spoiled(call, value[at]), *value[at + 1 :]]
    if isinstance(value, bool):
        return not value
    if isinstance(value, str):
        return call.pick(("", "nonsense", "systematic"))
    return call.pick((*INTEGERS, *NUMBERS, None))


def laid_out_anew(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone(memory_format=torch.contiguous_format)
    return [laid_out_anew(each) for each in value] if isinstance(value, list) else value


def overlaps(value: Any) -> bool:
    return isinstance(value, Tensor) and any(
        stride == 0 and size > 1 for stride, size in zip(value.stride(), value.shape, strict=True)
    )


def answer(name: str, arguments: dict[str, Any]) -> list[Tensor]:
    """The tensors that come out, those that were written to among them."""
    result = getattr(torch.ops.winnow, name)(**arguments)
    out = list(result) if isinstance(result, tuple) else [result]
    out += [arguments[a.name] for a in SCHEMAS[name].arguments if a.is_out or a.alias_info]
    return [value for value in out if value is not None]


@pytest.mark.parametrize("name", SCHEMAS)
def test_an_answer_or_an_error_that_names_an_argument(name: str):
    schema = SCHEMAS[name]
    known = {argument.name for argument in schema.arguments}
    required = {argument.name for argument in schema.arguments if not argument.has_default_value()}
    optional = {a.name for a in schema.arguments if a.type.kind() == "OptionalType"}
    written = {a.name for a in schema.arguments if a.alias_info and a.alias_info.is_write}
    named = re.compile(r"\b(" + "|".join(known) + r")\b")

    @settings(
        max_examples=EXAMPLES,
        derandomize="WINNOW_FUZZ_EXAMPLES" not in os.environ,
        database=None,
        deadline=None,
        phases=[Phase.generate],  # looking for a smaller example takes minutes
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def run(data: st.DataObject) -> None:
        torch.manual_seed(data.draw(st.integers(0, 99)))
        call = Call(data)
        arguments = ARGUMENTS[name](call)
        # A list of arguments that misses one, or has one too many, would be refused every time.
        assert required <= arguments.keys() <= known
        for _ in range(call.pick((0, 1, 1, 1, 2, 3))):
            which = call.pick(sorted(arguments))
            # Without a tensor that it needs, an operator is not reached at all.
            absent = which in optional and call.size(9) == 0
            arguments[which] = None if absent else spoiled(call, arguments[which])
        note(str(arguments))
        dense = {key: laid_out_anew(value) for key, value in arguments.items()}
        refused = None
        try:
            out = answer(name, arguments)
        except (ValueError, RuntimeError, TypeError) as error:
            refused = str(error)
        if refused is not None:
            assert named.search(refused), refused
            assert not INTERNAL.search(refused), refused
            return
        if any(overlaps(arguments[key]) for key in written):
            return
        for given_strides, contiguous in zip(out, answer(name, dense), strict=True):
            assert torch.equal(given_strides.nan_to_num(0.1), contiguous.nan_to_num(0.1))

    run()


def test_every_operator_is_called():
    assert ARGUMENTS.keys() == SCHEMAS.keys()
