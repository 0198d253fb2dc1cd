"""The published samplers with their defaults, as keyword arguments of :func:`generate`.

    >>> import torch
    >>> from torch_winnow.unmasking import generate, presets
    >>> model = lambda tokens: torch.eye(4, 5)[None]
    >>> sampler = presets.llada(gen_length=4, steps=2, block_length=4)
    >>> generate(model, torch.full((1, 4), 4), mask_id=4, **sampler).calls
    2

A preset may be changed like any dictionary: ``{**presets.fast_dllm(), "temperature": 0.2}``. Those
that draw need a ``seed`` or ``generator`` besides.
"""

from __future__ import annotations

from typing import Any

import torch

from torch_winnow._unmasking.arguments import choice, integer, number
from torch_winnow._unmasking.history_rules import DraftVerify, KLStability, Remasking
from torch_winnow._unmasking.rules import (
    ConfidenceFactor,
    ConfidenceThreshold,
    EntropyBound,
    EntropyThreshold,
    PrefixThreshold,
    TopK,
)

__all__ = [
    "ar_med",
    "dream",
    "eb",
    "fast_dllm",
    "klass",
    "llada",
    "med",
    "remdm",
    "sdlm",
    "wino",
]

Options = dict[str, Any]


def llada(
    *,
    gen_length: int = 128,
    steps: int = 128,
    block_length: int = 128,
    temperature: float = 0.0,
    cfg_scale: float = 0.0,
    remasking: str = "low_confidence",
) -> Options:
    """LLaDA, arXiv 2502.09992: masks / steps tokens per step, most confident first or at random.

    Positions are ranked by raw probabilities, tokens drawn at the temperature.

    Args:
        gen_length: masks in all, a multiple of ``block_length``.
        steps: calls in all, a multiple of the number of blocks.
        remasking: ``"low_confidence"`` or ``"random"``.
    """
    choice("remasking", remasking, ("low_confidence", "random"))
    gen_length = integer("gen_length", gen_length, 1)
    block_length = integer("block_length", block_length, 1)
    steps = integer("steps", steps, 1)
    if gen_length % block_length:
        raise ValueError(
            f"gen_length: expected a multiple of block_length={block_length}, got {gen_length}"
        )
    blocks = gen_length // block_length
    if steps % blocks:
        raise ValueError(f"steps: expected a multiple of the {blocks} blocks, got {steps}")
    return {
        "rule": TopK(1, score="confidence" if remasking == "low_confidence" else "random"),
        "block_length": block_length,
        "steps": steps // blocks,
        "temperature": temperature,
        "cfg_scale": cfg_scale,
        "statistics": "raw",
    }


def dream(
    *,
    gen_length: int,
    steps: int = 512,
    temperature: float = 0.0,
    top_p: float | None = None,
    top_k: int | None = None,
    alg: str = "origin",
    alg_temp: float | None = None,
    eps: float = 1e-3,
) -> Options:
    """Dream, arXiv 2508.15487: step i of n writes int(masks left (1 - s/t)), t going from 1 to eps.

    Positions are ranked by processed probabilities. Steps that write nothing are left out, so there
    are at most ``gen_length`` calls.

    Args:
        gen_length: masks per row, as many in every row.
        alg: ``"maskgit_plus"`` (confidence), ``"topk_margin"``, ``"entropy"``, or ``"origin"``:
            each mask by itself with probability 1 - s/t, in the limit of ``eps`` = 0.
        alg_temp: above 0 positions are drawn by their score, see ``position_temperature`` of
            :class:`TopK`; not with ``"origin"``.
    """
    choice("alg", alg, ("origin", "maskgit_plus", "topk_margin", "entropy"))
    steps, left = integer("steps", steps, 1), integer("gen_length", gen_length, 1)
    if steps > 2**24:  # as many times as float32 tells apart
        raise ValueError(f"steps: expected at most 2**24, got {steps}")
    number("eps", eps, 0.0, 1.0)
    options: Options = {"temperature": temperature, "top_p": top_p, "top_k": top_k}
    alg_temp = 0.0 if alg_temp is None else number("alg_temp", alg_temp, 0.0)
    if alg == "origin":
        if alg_temp > 0.0:
            raise ValueError(f"alg_temp: expected None with alg='origin', got {alg_temp}")
        return {"rule": Remasking(steps), **options}
    # In float32, as published: the integer parts are those of float32 products.
    time = torch.linspace(1, eps, steps + 1)
    counts = []
    for i in range(steps):
        share = 1 - time[i + 1] / time[i]
        count = int(torch.tensor(float(left)) * share) if i < steps - 1 else left
        if count:
            counts.append(count)
        left -= count
    score = {"maskgit_plus": "confidence", "topk_margin": "margin", "entropy": "entropy"}[alg]
    rule = TopK(tuple(counts), score=score, position_temperature=alg_temp)
    return {"rule": rule, **options}


def fast_dllm(
    *, threshold: float = 0.9, factor: float | None = None, block_length: int | None = 32
) -> Options:
    """Fast-dLLM, arXiv 2505.22618: all of confidence >= ``threshold``, or by ``factor`` (1)."""
    rule = ConfidenceThreshold(threshold) if factor is None else ConfidenceFactor(factor)
    return {
        "rule": rule,
        "block_length": block_length,
        "temperature": 0.0,
        "statistics": "raw",
    }


def klass(
    *,
    threshold: float = 0.9,
    kl_threshold: float = 0.01,
    history: int = 2,
    block_length: int | None = 64,
) -> Options:
    """KLASS, arXiv 2511.05664: sure and stable positions, see :class:`KLStability`."""
    return {
        "rule": KLStability(threshold, kl_threshold, history),
        "block_length": block_length,
        "temperature": 0.0,
    }


def med(
    *, threshold: float = 0.2, max_tokens: int | None = None, block_length: int | None = None
) -> Options:
    """Multi-token entropy decoding, arXiv 2510.19990: all of entropy < ``threshold``."""
    return {
        "rule": EntropyThreshold(threshold, max_tokens),
        "block_length": block_length,
        "temperature": 0.0,
    }


def ar_med(
    *, threshold: float = 0.2, max_tokens: int | None = None, block_length: int | None = None
) -> Options:
    """MED from left to right: the longest run of entropy < ``threshold``."""
    return {
        "rule": EntropyThreshold(threshold, max_tokens, order="left_to_right"),
        "block_length": block_length,
        "temperature": 0.0,
    }


def eb(*, gamma: float = 0.1, block_length: int | None = None) -> Options:
    """The entropy-bounded sampler, arXiv 2505.24857, see :class:`EntropyBound`."""
    return {"rule": EntropyBound(gamma), "block_length": block_length, "temperature": 0.0}


def wino(*, draft: float = 0.6, verify: float = 0.9, block_length: int | None = 128) -> Options:
    """WINO, arXiv 2507.18578: drafts widely and verifies, see :class:`DraftVerify`.

    The model to give :func:`generate` is a :class:`ShadowBlock`.
    """
    return {
        "rule": DraftVerify(draft, verify),
        "block_length": block_length,
        "temperature": 0.0,
        "statistics": "raw",
        "context": True,
    }


def remdm(
    *,
    steps: int = 1024,
    schedule: str = "cap",
    eta: float | None = None,
    top_p: float | None = 0.9,
) -> Options:
    """ReMDM, arXiv 2503.00307: the ancestral sampler with remasking, see :class:`Remasking`.

    ``eta`` is 0.008 for ``"cap"`` and 0.015 for ``"rescale"``, as in the paper's experiments.
    """
    if eta is None:
        eta = {"cap": 0.008, "rescale": 0.015}.get(schedule, 0.0)
    return {"rule": Remasking(steps, eta, schedule), "top_p": top_p}


def sdlm(*, threshold: float = 0.9, block_length: int = 4) -> Options:
    """SDLM, arXiv 2509.24007: the longest sure prefix of the next ``block_length`` positions."""
    return {
        "rule": PrefixThreshold(threshold),
        "block_length": block_length,
        "sliding": True,
        "temperature": 0.0,
    }
