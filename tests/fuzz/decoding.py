"""Arguments that fit together: rules, presets, and the loops of unmasking."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fuzz.call import Call
from torch_winnow import unmasking
from torch_winnow.unmasking import presets

RULES: dict[str, dict[str, Any]] = {
    "ConfidenceFactor": {"factor": 1.5},
    "ConfidenceThreshold": {"threshold": 0.9},
    "DraftVerify": {"draft": 0.5, "verify": 0.8},
    "EntropyBound": {"gamma": 0.2},
    "EntropyThreshold": {"threshold": 0.2, "max_tokens": 2, "order": "left_to_right"},
    "KLStability": {"threshold": 0.9, "kl_threshold": 0.1, "history": 2, "num_tokens": 1},
    "PrefixThreshold": {"threshold": 0.9, "score": "margin"},
    "Remasking": {"steps": 4, "eta": 0.1, "schedule": "cap"},
    "TopK": {"num_tokens": 2, "score": "entropy", "position_temperature": 0.5},
}
PRESETS: dict[str, dict[str, Any]] = {
    "ar_med": {"threshold": 0.2, "max_tokens": 3, "block_length": 4},
    "dream": {"gen_length": 4, "steps": 4, "top_p": 0.9, "alg": "entropy", "alg_temp": 0.1},
    "eb": {"gamma": 0.1, "block_length": 4},
    "fast_dllm": {"threshold": 0.9, "factor": None, "block_length": 4},
    "klass": {"threshold": 0.9, "kl_threshold": 0.1, "history": 2, "block_length": 4},
    "llada": {"gen_length": 8, "steps": 4, "block_length": 4, "remasking": "random"},
    "remdm": {"steps": 4, "schedule": "rescale", "eta": 0.1, "top_p": 0.9},
    "sdlm": {"threshold": 0.9, "block_length": 4},
    "wino": {"draft": 0.5, "verify": 0.8, "block_length": 4},
}
VOCAB = 7


def rule(call: Call) -> Any:
    """One that looks at a single step."""
    name = call.pick(("ConfidenceFactor", "EntropyBound", "EntropyThreshold", "TopK"))
    return getattr(unmasking, name)(**RULES[name])


def model(tokens: Tensor) -> Tensor:
    return torch.linspace(-3, 3, tokens.numel() * VOCAB).sin().view(*tokens.shape, VOCAB)


def generate(call: Call) -> dict[str, Any]:
    tokens = call.indices(call.size(2), call.size(6), below=3)
    some = call.pick(sorted(RULES))
    return {
        "tokens": tokens,
        "mask_id": 0,
        "rule": getattr(unmasking, some)(**RULES[some]),
        "block_length": call.pick((None, 1, 3)),
        "steps": call.pick((None, 1, 20)),
        "stop": call.maybe(lambda: unmasking.AnswerEntropy(tokens[0] < 9, 0.1))
        if len(tokens)
        else None,
        "seed": call.maybe(call.seed),
        "temperature": call.pick((0.0, 0.7)),
        "top_k": call.pick((None, 2)),
    }


def generated(call: Call) -> dict[str, Any]:
    return generate(call) | {"model": model}


def advanced(call: Call) -> dict[str, Any]:
    arguments = generate(call) | {"steps": None}
    logits = model(arguments["tokens"])
    return {"self": unmasking.Decoding(**arguments), "logits": logits}


def score_span(call: Call) -> dict[str, Any]:
    tokens = call.indices(call.size(2), 6, below=3)
    positions = torch.tensor([1, 3])
    seed = call.maybe(call.seed)
    chosen = call.maybe(lambda: rule(call))
    return {"tokens": tokens, "positions": positions, "seed": seed, "rule": chosen} | {
        "model": model,
        "mask_id": 9,
    }


def merge_logit_stats(call: Call) -> dict[str, Any]:
    logits = call.floats(call.size(3), 9)
    parts = [
        unmasking.logit_stats(part, vocab_start=start)
        for part, start in ((logits[:, :4], 0), (logits[:, 4:], 4))
    ]
    return {"parts": parts}


def template(call: Call) -> dict[str, Any]:
    return {"parts": [[1, 2], ("name", call.size(3)), [3]], "mask_id": 9}


def filled(call: Call) -> dict[str, Any]:
    made = unmasking.Template([[1, 2], ("name", 2), [3]], 9)
    return {"self": made, "name": call.pick(([4, 5], torch.tensor([4, 5])))}


def read(call: Call) -> dict[str, Any]:
    made = unmasking.Template([[1, 2], ("name", 2), [3]], 9)
    return {"self": made, "tokens": call.indices(call.size(2), 5, below=9), "name": "name"}


def answer_entropy(call: Call) -> dict[str, Any]:
    return {"positions": call.bools(call.size(3)), "gamma": 0.1}


def constant(options: dict[str, Any]) -> Callable[[Call], dict[str, Any]]:
    return lambda call: dict(options)


FUNCTIONS: dict[str, tuple[Callable[..., Any], Callable[[Call], dict[str, Any]]]] = {
    **{name: (getattr(unmasking, name), constant(RULES[name])) for name in RULES},
    **{f"presets.{name}": (getattr(presets, name), constant(PRESETS[name])) for name in PRESETS},
    "AnswerEntropy": (unmasking.AnswerEntropy, answer_entropy),
    "Decoding": (unmasking.Decoding, generate),
    "Decoding.advance": (unmasking.Decoding.advance, advanced),
    "Template": (unmasking.Template, template),
    "Template.fill": (unmasking.Template.fill, filled),
    "Template.read": (unmasking.Template.read, read),
    "generate": (unmasking.generate, generated),
    "merge_logit_stats": (unmasking.merge_logit_stats, merge_logit_stats),
    "score_span": (unmasking.score_span, score_span),
}
