"""Benchmarks of the CUDA operators; prints JSON. Run by ``make gpu-check``.

    python bench/gpu_bench.py results.json

Each case checks our output against the definition, then times ours, the definition in eager torch
and compiled, and the strongest rival there is. ``moved`` is the least memory traffic in bytes that
the definition needs: the report divides it by the time and by the copy bandwidth of the same run.
``operations``, where given, are divided by the time and by the matmul rate.
"""

from __future__ import annotations

import json
import math
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from gpu_bench_attention import block_diagonal_attention, cat_attention, chunk_attention
from gpu_bench_memory import block_selection, gather_particles, paged_write
from gpu_bench_pages import attention_mass, quantised_decode
from gpu_case import DEVICE, Case, close, compiled, scaled
from gpu_timing import limits, rotation, seconds
from torch_winnow import kvcache, reference, resampling, unmasking


def effective_sample_size() -> Iterator[Case]:
    for rows, particles in ((4096, 4), (256, 4096), (1, scaled(1_000_000, 70_000))):
        yield Case(
            f"effective_sample_size {rows}x{particles} float32",
            lambda rows=rows, particles=particles: (torch.randn(rows, particles, device=DEVICE),),
            resampling.effective_sample_size,
            {
                "eager": reference.effective_sample_size,
                "compiled": compiled(reference.effective_sample_size),
            },
            rows * particles * 4.0,
            close(resampling.effective_sample_size, reference.effective_sample_size, 1e-4),
        )


def systematic_step(log_weights: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Systematic resampling with ESS and log Z, composed of torch operators."""
    particles = log_weights.shape[-1]
    share = log_weights.softmax(-1)
    ess = (share * share).sum(-1).reciprocal()
    log_z = log_weights.logsumexp(-1) - math.log(particles)
    u = torch.rand(*log_weights.shape[:-1], 1, device=log_weights.device)
    points = (torch.arange(particles, device=log_weights.device) + u) / particles
    ancestors = torch.searchsorted(share.cumsum(-1), points).clamp_(max=particles - 1)
    return ancestors, ess, log_z


def check_systematic(log_weights: torch.Tensor) -> None:
    result = resampling.resample(log_weights, seed=1)
    particles = log_weights.shape[-1]
    shares = particles * log_weights.double().softmax(-1).cumsum(-1)
    assert (result.offspring.cumsum(-1) - shares).abs().max() < 1 + 1e-6 * particles


def resample() -> Iterator[Case]:
    seed = torch.tensor(1, device=DEVICE)
    for rows, particles in ((4096, 4), (scaled(256, 4), 4096), (1, scaled(1_000_000, 17_000))):
        yield Case(
            f"resample systematic {rows}x{particles} float32",
            lambda rows=rows, particles=particles: (torch.randn(rows, particles, device=DEVICE),),
            lambda log_weights: resampling.resample(log_weights, seed=seed),
            {"eager": systematic_step, "compiled": compiled(systematic_step)},
            rows * particles * 24.0,
            check_systematic,
        )


def check_offspring(log_weights: torch.Tensor) -> None:
    result = resampling.resample(log_weights, scheme="ssp", keep_slots=True, seed=1)
    counts = result.ancestors[0].bincount(minlength=log_weights.shape[-1])
    assert torch.equal(counts, result.offspring[0])
    shares = log_weights.shape[-1] * log_weights.double().softmax(-1)
    assert (result.offspring - shares).abs().max() < 1 + 1e-3


def resample_by_steps() -> Iterator[Case]:
    """A scheme and an option that need the most steps of a huge population's blocks."""
    particles = scaled(1_000_000, 17_000)
    yield Case(
        f"resample ssp keep_slots 1x{particles} float32",
        lambda: (torch.randn(1, particles, device=DEVICE),),
        lambda log_weights: resampling.resample(log_weights, scheme="ssp", keep_slots=True, seed=1),
        {},
        particles * 24.0,
        check_offspring,
    )


def without_replacement() -> Iterator[Case]:
    rows, particles, k = scaled(256, 2), scaled(1000, 30), scaled(16, 4)
    yield Case(
        f"inclusion_probabilities {rows}x{particles} k={k} float32",
        lambda: (torch.randn(rows, particles, device=DEVICE),),
        lambda log_weights: resampling.inclusion_probabilities(log_weights, k),
        {"eager": lambda log_weights: reference.inclusion_probabilities(log_weights, k)},
        rows * particles * 8.0,
        close(
            lambda log_weights: resampling.inclusion_probabilities(log_weights, k),
            lambda log_weights: reference.inclusion_probabilities(log_weights, k),
            1e-5,
        ),
    )


def entropy_step(logits: torch.Tensor) -> torch.Tensor:
    """What a decoding step computes in plain torch: token, confidence, margin, entropy."""
    log_p = logits.float().log_softmax(-1)
    p = log_p.exp()
    top = p.topk(2, -1)
    return torch.stack(
        [top.indices[..., 0].float(), top.values[..., 0], top.values.diff(dim=-1)[..., 0].neg()]
        + [-(p * log_p).sum(-1)]
    )


def our_step(logits: torch.Tensor) -> torch.Tensor:
    stats = unmasking.logit_stats(logits)
    return torch.stack([stats.token.float(), stats.max_prob, stats.margin, stats.entropy])


def logit_stats() -> Iterator[Case]:
    vocab = scaled(126_464, 9000)
    for rows in (1, scaled(32, 2), scaled(256, 2)):
        for dtype in (torch.float32, torch.bfloat16):
            yield Case(
                f"logit_stats {rows}x{vocab} {str(dtype).removeprefix('torch.')}",
                lambda rows=rows, dtype=dtype: (
                    torch.randn(rows, vocab, device=DEVICE).to(dtype) * 2,
                ),
                unmasking.logit_stats,
                {"eager": entropy_step, "compiled": compiled(entropy_step)},
                rows * vocab * dtype.itemsize,
                close(our_step, entropy_step, 1e-3),
            )
    seed = torch.tensor(1, device=DEVICE)
    yield Case(
        f"logit_stats top_k=50 top_p=0.9 drawn {scaled(32, 2)}x{vocab} bfloat16",
        lambda: (torch.randn(scaled(32, 2), vocab, device=DEVICE).to(torch.bfloat16) * 2,),
        lambda logits: unmasking.logit_stats(logits, top_k=50, top_p=0.9, seed=seed),
        {},
        scaled(32, 2) * vocab * 2,
        lambda logits: None,
    )


def unmask_step() -> Iterator[Case]:
    """A block of 32 masked positions of each sequence, those below an entropy at once."""
    vocab, batch, length = scaled(126_464, 9000), scaled(8, 2), 32
    rule = unmasking.EntropyThreshold(3.0)

    def make() -> tuple:
        logits = 4 * torch.randn(batch, length, vocab, device=DEVICE, dtype=torch.bfloat16)
        return torch.full((batch, length), vocab, device=DEVICE), logits

    def ours(tokens, logits) -> torch.Tensor:
        tokens.fill_(vocab)  # the step writes them
        return unmasking.unmask_step_(tokens, logits, mask_id=vocab, rule=rule).count

    def eager(tokens, logits) -> torch.Tensor:
        tokens.fill_(vocab)
        log_p = logits.float().log_softmax(-1)
        entropy = -(log_p.exp() * log_p).sum(-1)
        masked = tokens == vocab
        entropy = entropy.masked_fill(~masked, float("inf"))
        best = entropy == entropy.amin(-1, keepdim=True)
        transfer = masked & ((entropy < rule.threshold) | best)
        tokens.copy_(torch.where(transfer, logits.argmax(-1), tokens))
        return transfer.sum(-1)

    def check(tokens, logits) -> None:
        ours(tokens, logits)
        written = tokens.clone()
        eager(tokens, logits)
        assert (written == tokens).float().mean() > 0.98  # entropies next to the threshold

    yield Case(
        f"unmask_step_ EntropyThreshold {batch}x{length}x{vocab} bfloat16",
        make,
        ours,
        {"eager": eager, "compiled": compiled(eager)},
        batch * length * vocab * 2.0,
        check,
    )


def composed_verify(drafts, draft, target) -> torch.Tensor:
    p, q = target.float().softmax(-1), draft.float().softmax(-1)
    ratio = (p[:, :-1] / q).gather(-1, drafts[..., None])[..., 0]
    accepted = (torch.rand_like(ratio) < ratio).cumprod(1).sum(1)
    row = accepted[:, None, None].expand(-1, 1, p.shape[-1])
    residual = (p.gather(1, row) - F.pad(q, (0, 0, 0, 1)).gather(1, row)).clamp(min=0)[:, 0]
    return residual.multinomial(1)


def speculative_verify() -> Iterator[Case]:
    vocab, steps = scaled(126_464, 9000), 4
    seed = torch.tensor(1, device=DEVICE)
    for batch in (1, scaled(32, 2)):

        def make(batch=batch) -> tuple:
            target = torch.randn(batch, steps + 1, vocab, device=DEVICE)
            draft = target[:, :-1] + 0.3 * torch.randn_like(target[:, :-1])
            drafts = draft.softmax(-1).view(-1, vocab).multinomial(1).view(batch, steps)
            return drafts, draft.to(torch.bfloat16), target.to(torch.bfloat16)

        def check(drafts, draft, target) -> None:
            greedy = unmasking.speculative_verify(drafts, None, target, temperature=0.0)
            best = target.argmax(-1)
            agree = (drafts == best[:, :-1]).long().cumprod(1).sum(1)
            assert torch.equal(greedy.accepted, agree)
            assert torch.equal(greedy.token, best.gather(1, agree[:, None])[:, 0])

        yield Case(
            f"speculative_verify {batch}x{steps}x{vocab} bfloat16",
            make,
            lambda drafts, draft, target: unmasking.speculative_verify(
                drafts, draft, target, seed=seed
            ),
            {"composed": composed_verify},
            batch * (2 * steps + 1) * vocab * 2.0,
            check,
        )


def soft_embedding() -> Iterator[Case]:
    vocab, rows, width = scaled(126_464, 9000), scaled(32, 2), scaled(4096, 64)

    def make() -> tuple:
        logits = 4 * torch.randn(rows, vocab, device=DEVICE, dtype=torch.bfloat16)
        return logits, torch.randn(vocab, width, device=DEVICE, dtype=torch.bfloat16)

    def ours(logits, embedding) -> torch.Tensor:
        return unmasking.soft_embedding(logits, embedding, mask_id=0, top_k=64)

    def definition(logits, embedding) -> torch.Tensor:
        return reference.soft_embedding(logits, embedding, mask_id=0, top_k=64)

    yield Case(
        f"soft_embedding top_k=64 {rows}x{vocab}, {width} columns, bfloat16",
        make,
        ours,
        {"eager": definition},
        rows * vocab * 2.0,
        close(ours, definition, 3e-2),
    )


def paged_decode() -> Iterator[Case]:
    heads, key_heads, dim, block = 32, 8, 128, 64
    for batch, length in ((1, 32_768), (8, 32_768), (64, 2048)):
        batch, length = scaled(batch, 1), scaled(length, 256)
        blocks = length // block

        def make(batch=batch, length=length, blocks=blocks) -> tuple:
            shape = (batch * blocks, key_heads, block, dim)
            key, value = torch.randn(2, *shape, device=DEVICE, dtype=torch.bfloat16)
            table = torch.randperm(batch * blocks, device=DEVICE).int().view(batch, blocks)
            lengths = torch.full((batch,), length, dtype=torch.int32, device=DEVICE)
            query = torch.randn(batch, heads, 1, dim, device=DEVICE, dtype=torch.bfloat16)
            return query, key, value, table, lengths

        def dense(pages: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
            return pages[table.long()].transpose(1, 2).flatten(2, 3)

        def check(query, key, value, table, lengths, dense=dense) -> None:
            expected = F.scaled_dot_product_attention(
                query, dense(key, table), dense(value, table), enable_gqa=True
            )
            result = kvcache.paged_attention(query, key, value, table, lengths)
            torch.testing.assert_close(result, expected, rtol=2e-2, atol=2e-3)

        def sdpa(query, key, value, table, lengths) -> torch.Tensor:
            """Contiguous keys of the same bytes: no gather is charged to it."""
            keys, values = (
                pages.view(table.shape[0], key_heads, -1, dim) for pages in (key, value)
            )
            return F.scaled_dot_product_attention(query, keys, values, enable_gqa=True)

        def gathered(query, key, value, table, lengths, dense=dense) -> torch.Tensor:
            return F.scaled_dot_product_attention(
                query, dense(key, table), dense(value, table), enable_gqa=True
            )

        yield Case(
            f"paged_attention decode B={batch} N={length} bfloat16",
            make,
            kvcache.paged_attention,
            {"sdpa, contiguous": sdpa, "gather + sdpa": gathered},
            2.0 * batch * length * key_heads * dim * 2,
            check,
        )


CASES = (
    effective_sample_size,
    resample,
    resample_by_steps,
    without_replacement,
    logit_stats,
    speculative_verify,
    soft_embedding,
    unmask_step,
    paged_decode,
    quantised_decode,
    attention_mass,
    paged_write,
    block_selection,
    gather_particles,
    cat_attention,
    chunk_attention,
    block_diagonal_attention,
)


def main() -> None:
    torch.manual_seed(0)
    report: dict[str, Any] = {"device": str(DEVICE), "limits": limits(DEVICE), "cases": []}
    for case in (case for family in CASES for case in family()):
        entry: dict[str, Any] = {"name": case.name, "moved": case.moved, "seconds": {}}
        entry["operations"] = case.operations
        report["cases"].append(entry)
        inputs = rotation(case.make, DEVICE)
        for name, function in {"winnow": case.ours, **case.rivals}.items():
            try:
                if name == "winnow":
                    case.check(*inputs[0])
                entry["seconds"][name] = seconds(function, inputs, DEVICE)
            except Exception as error:  # a rival that fails is reported, and so are we
                traceback.print_exc()
                entry.setdefault("errors", {})[name] = f"{type(error).__name__}: {error}"[:300]
        del inputs
        Path(sys.argv[1]).write_text(json.dumps(report, indent=1))  # kept if a later case is killed
    if any("winnow" in entry.get("errors", {}) for entry in report["cases"]):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
