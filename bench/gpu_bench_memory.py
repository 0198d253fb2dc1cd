"""What moves rows of memory on the GPU: particles, tokens into pages, and the choice of blocks.

Rivals are the indexing of torch for the same move; their limit is the copy bandwidth.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from gpu_case import DEVICE, Case, close, compiled, scaled
from torch_winnow import kvcache, reference, resampling


def resampled(particles: int) -> torch.Tensor:
    """Ancestors of a typical step, in which about half of the particles stay."""
    weights = torch.randn(particles, device=DEVICE)
    return resampling.resample(weights, seed=1, keep_slots=True).ancestors


def gather_particles() -> Iterator[Case]:
    particles, width = scaled(1024, 16), scaled(65_536, 64)

    def make() -> tuple:
        rows = torch.randn(particles, width, device=DEVICE, dtype=torch.bfloat16)
        return rows, resampled(particles)

    def eager(rows: torch.Tensor, ancestors: torch.Tensor) -> torch.Tensor:
        return rows.index_select(0, ancestors)

    yield Case(
        f"gather_particles {particles}x{width} bfloat16",
        make,
        resampling.gather_particles,
        {"index_select": eager, "compiled": compiled(eager)},
        4.0 * particles * width,
        close(resampling.gather_particles, eager, 0.0),
    )

    def check(rows: torch.Tensor, ancestors: torch.Tensor) -> None:
        moved = resampling.gather_particles_(rows.clone(), ancestors)
        assert torch.equal(moved, rows[ancestors])

    def copied(rows: torch.Tensor, ancestors: torch.Tensor) -> torch.Tensor:
        return rows.copy_(rows.index_select(0, ancestors))

    rows, ancestors = make()
    places = torch.arange(particles, device=DEVICE)
    changed = int((ancestors != places).sum())
    del rows
    yield Case(
        f"gather_particles_ {particles}x{width}, {changed} rows move, bfloat16",
        make,
        resampling.gather_particles_,
        {"index_select + copy": copied},
        4.0 * changed * width,
        check,
    )


def paged_write() -> Iterator[Case]:
    key_heads, dim, block = 8, 128, 64
    write = torch.ops.winnow.paged_write_.default
    for batch, tokens in ((scaled(64, 2), 1), (scaled(8, 2), scaled(2048, 100))):
        blocks = 4 + tokens // block

        def make(batch=batch, tokens=tokens, blocks=blocks) -> tuple:
            pages = (batch * blocks, key_heads, block, dim)
            key_pages, value_pages = torch.zeros(2, *pages, device=DEVICE, dtype=torch.bfloat16)
            new = (batch, key_heads, tokens, dim)
            key, value = torch.randn(2, *new, device=DEVICE, dtype=torch.bfloat16)
            table = torch.randperm(batch * blocks, device=DEVICE).int().view(batch, blocks)
            positions = 70 + torch.arange(tokens, device=DEVICE).expand(batch, -1).contiguous()
            return key_pages, value_pages, key, value, table, positions

        def indexed(key_pages, value_pages, key, value, table, positions) -> None:
            at = table.gather(1, positions // block).long(), positions % block
            key_pages[at[0], :, at[1]] = key.transpose(1, 2)
            value_pages[at[0], :, at[1]] = value.transpose(1, 2)

        def check(*arguments: torch.Tensor, indexed=indexed) -> None:
            ours, theirs = ([x.clone() for x in arguments] for _ in range(2))
            write(*ours)
            indexed(*theirs)
            assert torch.equal(ours[0], theirs[0])
            assert torch.equal(ours[1], theirs[1])

        yield Case(
            f"paged_write_ B={batch} T={tokens} bfloat16",
            make,
            write,
            {"index_put": indexed, "compiled": compiled(indexed)},
            8.0 * batch * tokens * key_heads * dim,
            check,
        )


def block_selection() -> Iterator[Case]:
    """A decoding step's choice of 32 blocks of 64 tokens, from summaries that exist."""
    batch, heads, key_heads, dim, block, chosen = scaled(8, 2), 32, 8, 128, 64, 32
    blocks = scaled(512, 40)

    def make() -> tuple:
        query = torch.randn(batch, heads, 1, dim, device=DEVICE, dtype=torch.bfloat16)
        low = torch.randn(batch, key_heads, blocks, dim, device=DEVICE)
        lengths = torch.full((batch,), blocks * block, dtype=torch.int32, device=DEVICE)
        return query, torch.stack([low, low + 1.0], 3), lengths

    def ours(query, summaries, lengths) -> torch.Tensor:
        scores = kvcache.score_blocks(query, summaries)
        return kvcache.select_blocks(scores, chosen, seq_lens=lengths, block_size=block)

    def eager(query, summaries, lengths) -> torch.Tensor:
        groups = query.float().view(batch, key_heads, -1, 1, dim)
        low, high = (groups * summaries[:, :, None, :, i] for i in range(2))
        scores = torch.maximum(low, high).sum(-1).amax(2)
        scores[..., 0] = scores[..., -1] = float("inf")  # the sink and the recent block
        return scores.topk(chosen).indices.sort().values.int()

    def check(query, summaries, lengths) -> None:
        cpu = [x.cpu() for x in (query, summaries, lengths)]
        scores = reference.score_blocks(cpu[0].double(), cpu[1].double())
        expected = reference.select_blocks(scores, chosen, seq_lens=cpu[2], block_size=block)
        agree = (ours(query, summaries, lengths).cpu() == expected).float().mean()
        assert agree > 0.99, agree  # but for scores that are equal up to rounding

    yield Case(
        f"score_blocks, select_blocks {chosen} of {blocks}, B={batch}",
        make,
        ours,
        {"eager": eager, "compiled": compiled(eager)},
        8.0 * batch * key_heads * blocks * dim,
        check,
    )
