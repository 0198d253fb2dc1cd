"""Definitions of the statistics of logits. Give float64 logits for an oracle."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torch_winnow._unmasking.logit_stats import LogitStats, VocabularyPart

__all__ = ["linear_logit_stats", "logit_stats", "merge_logit_stats"]

INF = float("inf")


def truncated(
    logits: Tensor,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    min_p: float | None = None,
) -> Tensor:
    """Top-k, then the smallest set of mass >= top_p; ties are kept from the lowest index on.

    Then what is at least min_p times as probable as the most probable.
    """
    order = logits.argsort(dim=-1, descending=True, stable=True)
    ordered = logits.gather(-1, order)
    if top_k is not None:
        ordered[..., top_k:] = -INF
    if top_p is not None and top_p < 1:
        probability = (ordered / temperature).softmax(-1)
        before = probability.cumsum(-1) - probability
        beyond = before >= top_p
        beyond[..., :1] = False
        ordered = ordered.masked_fill(beyond, -INF)
    if min_p is not None and min_p > 0:
        least = (ordered[..., :1].double() + temperature * math.log(min_p)).to(logits.dtype)
        ordered = ordered.masked_fill(ordered < least, -INF)
    return torch.empty_like(logits).scatter(-1, order, ordered)


def logit_stats(
    logits: Tensor,
    *,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    suppress_ids: Tensor | Sequence[int] | None = None,
    target_ids: Tensor | None = None,
    previous_logits: Tensor | None = None,
    unconditional_logits: Tensor | None = None,
    cfg_scale: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    statistics: str = "processed",
    seed: int | Tensor | None = None,
    generator: torch.Generator | None = None,
    vocab_start: int | None = None,
    shift: bool = False,
) -> LogitStats:
    """See :func:`torch_winnow.unmasking.logit_stats`; the noise of a draw is another."""
    if shift:

        def earlier(x: Tensor) -> Tensor:
            return torch.cat([x[..., :1, :], x[..., :-1, :]], -2)

        logits = earlier(logits)
        previous_logits = None if previous_logits is None else earlier(previous_logits)
        if unconditional_logits is not None:
            unconditional_logits = earlier(unconditional_logits)
    if vocab_start is not None:
        return _part(
            logits,
            vocab_start,
            suppress_ids,
            target_ids,
            mask=mask,
            temperature=temperature,
            previous_logits=previous_logits,
            unconditional_logits=unconditional_logits,
            cfg_scale=cfg_scale,
            statistics=statistics,
            seed=seed,
            generator=generator,
        )
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    x = logits.to(dtype)
    if unconditional_logits is not None and cfg_scale != 0:
        u = unconditional_logits.to(dtype)
        x = torch.where(x == u, x, u + (cfg_scale + 1) * (x - u))
    previous = None if previous_logits is None else previous_logits.to(dtype)
    if suppress_ids is not None:
        ids = torch.as_tensor(suppress_ids, dtype=torch.int64)
        x = x.index_fill(-1, ids, -INF)
        previous = None if previous is None else previous.index_fill(-1, ids, -INF)
    draw_temperature = temperature if temperature > 0 else 1.0
    drawn = truncated(x, draw_temperature, top_k, top_p, min_p) / draw_temperature
    measure_temperature = 1.0 if statistics == "raw" else draw_temperature
    measured = x if statistics == "raw" else drawn

    nan = x.isnan().any(-1)
    top, argmax = x.max(-1)
    log_p = measured.log_softmax(-1)
    p = log_p.exp()
    largest = torch.nn.functional.pad(p, (0, 1)).topk(2, -1).values
    token = argmax
    if temperature > 0 and (seed is not None or generator is not None):
        if generator is None:
            generator = torch.Generator().manual_seed(int(torch.as_tensor(seed)))
        clock = torch.empty(x.shape, dtype=torch.float64).exponential_(generator=generator)
        arrival = clock.log() - drawn.double().log_softmax(-1)
        token = torch.where(top == INF, argmax, arrival.argmin(-1))
    kl = None
    if previous is not None:
        log_q = (previous / measure_temperature).log_softmax(-1)
        log_q = torch.where((previous == -INF).all(-1, keepdim=True), -INF, log_q)
        kl = torch.where(p == 0, 0.0, p * (log_p - log_q)).sum(-1)
    stats = {
        "log_prob": log_p.gather(-1, token[..., None])[..., 0],
        "max_prob": largest[..., 0],
        "margin": largest[..., 0] - largest[..., 1],
        "entropy": torch.special.entr(p).sum(-1),
        "logsumexp": measured.logsumexp(-1),
        "target_log_prob": None
        if target_ids is None
        else log_p.gather(-1, target_ids.clamp(0, x.shape[-1] - 1)[..., None])[..., 0],
        "kl": kl,
    }
    lost = nan | (top == -INF)
    stats = {
        name: None if value is None else value.masked_fill(nan, math.nan)
        for name, value in stats.items()
    }
    ids_of = {"token": token.masked_fill(lost, -1), "argmax": argmax.masked_fill(lost, -1)}
    if mask is not None:
        stats = {
            name: None if value is None else value.masked_fill(~mask, 0.0)
            for name, value in stats.items()
        }
        ids_of["token"] = ids_of["token"].masked_fill(~mask, -1)
        ids_of["argmax"] = ids_of["argmax"].masked_fill(~mask, 0)
    return LogitStats(**ids_of, **stats)  # type: ignore[arg-type]  # parts: None


def linear_logit_stats(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    suppress_ids: Tensor | Sequence[int] | None = None,
    target_ids: Tensor | None = None,
    statistics: str = "processed",
    seed: int | Tensor | None = None,
    generator: torch.Generator | None = None,
    shift: bool = False,
    **unavailable: object,
) -> LogitStats:
    """See :func:`torch_winnow.unmasking.linear_logit_stats`."""
    return logit_stats(
        torch.nn.functional.linear(hidden, weight, bias),
        mask=mask,
        temperature=temperature,
        suppress_ids=suppress_ids,
        target_ids=target_ids,
        statistics=statistics,
        seed=seed,
        generator=generator,
        shift=shift,
    )


def _part(
    logits: Tensor,
    start: int,
    suppress_ids: Tensor | Sequence[int] | None,
    target_ids: Tensor | None,
    **options: Any,
) -> LogitStats:
    """The definition's parts are the logits themselves, those of the step before appended."""
    stop = start + logits.shape[-1]
    ids = [] if suppress_ids is None else [int(i) for i in suppress_ids]
    suppressed = [i - start for i in ids if start <= i < stop]
    target = None if target_ids is None else target_ids - start
    stats = logit_stats(logits, suppress_ids=suppressed, target_ids=target, **options)
    if target is not None and stats.target_log_prob is not None:
        inside = (target >= 0) & (target < stop - start)
        measured = ~stats.target_log_prob.isnan() & (stats.max_prob > 0)
        outside = stats.target_log_prob.masked_fill(measured & ~inside, -INF)
        stats = stats._replace(target_log_prob=outside)
    x, unconditional = logits, options["unconditional_logits"]
    if unconditional is not None and options["cfg_scale"] != 0:
        guided = unconditional + (options["cfg_scale"] + 1) * (logits - unconditional)
        x = torch.where(logits == unconditional, logits, guided)
    held = [x] if options["previous_logits"] is None else [x, options["previous_logits"]]
    blocks = torch.stack(
        [row.index_fill(-1, torch.tensor(suppressed).long(), -INF) for row in held]
    )
    part = VocabularyPart(
        start,
        stop,
        blocks,
        options["temperature"],
        options["statistics"] == "raw",
        None if options["seed"] is None else torch.as_tensor(options["seed"]),
        target is not None,
        len(held) == 2,
    )
    skipped = stats.max_prob == 0
    return stats._replace(
        token=torch.where(stats.token < 0, stats.token, stats.token + start),
        argmax=torch.where((stats.argmax < 0) | skipped, stats.argmax, stats.argmax + start),
        parts=(part,),
    )


def merge_logit_stats(parts: Sequence[LogitStats]) -> LogitStats:
    """See :func:`torch_winnow.unmasking.merge_logit_stats`: the parts side by side."""
    by_start = sorted(parts, key=lambda part: part.parts[0].start if part.parts else 0)
    pieces = [piece for part in by_start for piece in part.parts or ()]
    rows = torch.cat([piece.blocks for piece in pieces], -1)
    first = pieces[0]
    whole = logit_stats(
        rows[0],
        mask=by_start[0].max_prob != 0,
        temperature=first.temperature,
        previous_logits=rows[1] if first.has_previous else None,
        statistics="raw" if first.raw else "processed",
        seed=first.seed,
    )
    if first.has_target:
        shares = [
            part.target_log_prob + part.logsumexp - whole.logsumexp
            for part in by_start
            if part.target_log_prob is not None
        ]
        whole = whole._replace(target_log_prob=torch.stack(shares).amax(0))
    return whole._replace(
        token=torch.where(whole.token < 0, whole.token, whole.token + first.start),
        argmax=torch.where(whole.argmax < 0, whole.argmax, whole.argmax + first.start),
        parts=tuple(pieces),
    )
