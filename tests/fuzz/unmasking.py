"""Arguments that fit together: the unmasking operators."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fuzz.call import NUMBERS, Call


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
