"""Captured in a CUDA graph, the operators replay with new inputs and new seeds.

Without a GPU a replay is another call, and what would make the host wait for the GPU is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from torch_winnow import kvcache, resampling, unmasking
from torch_winnow.attention import (
    block_diagonal_attention,
    cat_attention,
    chunk_attention,
    merge_attention,
)
from torch_winnow.resampling import effective_sample_size, resample
from torch_winnow.unmasking import EntropyThreshold, logit_stats, speculative_verify, unmask_step_

WAITING = {"_local_scalar_dense", "nonzero", "equal", "masked_select", "_unique2", "bincount"}


class NothingWaits(TorchDispatchMode):
    """Refuses what reads a tensor on the host, or needs a size that is known to the GPU alone."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        by_mask = name.startswith("index") and any(
            isinstance(x, torch.Tensor) and x.dtype == torch.bool
            for x in pytree.tree_leaves(args[1])
        )
        if name in WAITING or by_mask:
            raise AssertionError(f"{function} makes the host wait for the GPU")
        return function(*args, **(kwargs or {}))


def tensors_of(result: Any) -> list[torch.Tensor]:
    return [x for x in pytree.tree_leaves(result) if isinstance(x, torch.Tensor)]


def captured(gpu: torch.device, function: Callable[..., Any], *arguments: torch.Tensor):
    """A function that replays the call, and the tensors that it writes."""
    if gpu.type == "cpu":
        with NothingWaits():
            result = function(*arguments)

        def again() -> None:
            new = tensors_of(function(*arguments))
            for ours, theirs in zip(tensors_of(result), new, strict=True):
                ours.copy_(theirs)

        return again, result
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function(*arguments)  # warms up outside of the capture
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = function(*arguments)
    return graph.replay, result


@pytest.mark.parametrize("options", [{}, {"top_k": 20, "top_p": 0.9}], ids=str)
def test_logit_stats_replays_with_new_seeds(gpu, options):
    logits = torch.randn(8, 9000, device=gpu)
    seed = torch.tensor(0, device=gpu)
    replay, stats = captured(gpu, lambda x, s: logit_stats(x, seed=s, **options), logits, seed)
    drawn = set()
    for value in (1, 2, 3):
        seed.fill_(value)
        logits.normal_()
        replay()
        expected = logit_stats(logits, seed=value, **options)
        assert torch.equal(stats.token, expected.token)
        assert torch.equal(stats.entropy, expected.entropy)
        drawn.add(tuple(stats.token.tolist()))
    assert len(drawn) == 3


def test_paged_attention_replays_with_longer_sequences(gpu):
    key, value = torch.randn(2, 40, 2, 16, 64, device=gpu, dtype=torch.bfloat16)
    table = torch.arange(40, dtype=torch.int32, device=gpu).view(2, 20)
    lengths = torch.tensor([5, 100], dtype=torch.int32, device=gpu)
    query = torch.randn(2, 8, 1, 64, device=gpu, dtype=torch.bfloat16)
    arguments = (query, key, value, table, lengths)
    replay, out = captured(gpu, kvcache.paged_attention, *arguments)
    for length in (7, 64, 320):
        lengths.fill_(length)
        replay()
        assert torch.equal(out, kvcache.paged_attention(*arguments))


def test_effective_sample_size_replays(gpu):
    log_weights = torch.randn(3, 20_000, device=gpu)
    replay, ess = captured(gpu, effective_sample_size, log_weights)
    log_weights.normal_()
    replay()
    assert torch.equal(ess, effective_sample_size(log_weights))


@pytest.mark.parametrize("scheme", ["systematic", "killing", "ssp", "optimal"])
@pytest.mark.parametrize("shape", [(50, 8), (2, 20_000)], ids=str)
def test_resample_replays_with_new_seeds(gpu, scheme, shape):
    log_weights = torch.randn(shape, device=gpu)
    seed = torch.tensor(0, device=gpu)
    replay, result = captured(
        gpu, lambda x, s: resample(x, scheme=scheme, seed=s), log_weights, seed
    )
    for value in (1, 2):
        seed.fill_(value)
        log_weights.normal_()
        replay()
        expected = resample(log_weights, scheme=scheme, seed=value)
        assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))


def test_an_unmasking_step_replays(gpu):
    tokens = torch.full((2, 16), 99, device=gpu)
    logits = torch.randn(2, 16, 100, device=gpu)

    def step(tokens, logits):
        return unmask_step_(tokens, logits, mask_id=99, rule=EntropyThreshold(3.0)).count

    replay, count = captured(gpu, step, tokens, logits)
    for _ in range(3):
        logits.normal_().mul_(3)
        tokens.fill_(99)
        replay()
        written = tokens.clone()
        tokens.fill_(99)
        assert torch.equal(step(tokens, logits), count)
        assert torch.equal(tokens, written)


def test_a_verification_replays_with_new_seeds(gpu):
    target, draft = torch.randn(8, 3, 9000, device=gpu), torch.randn(8, 2, 9000, device=gpu)
    drafts = torch.randint(0, 9000, (8, 2), device=gpu)
    seed = torch.tensor(0, device=gpu)
    verify = lambda p, q, s: speculative_verify(drafts, q, p, seed=s)  # noqa: E731
    replay, result = captured(gpu, verify, target, draft, seed)
    for value in (1, 2):
        seed.fill_(value)
        target.normal_()
        replay()
        expected = speculative_verify(drafts, draft, target, seed=value)
        assert torch.equal(result.tokens, expected.tokens)


@pytest.mark.parametrize("dim", [40, 128])
def test_attention_and_its_gradient_replay(gpu, dim):
    query, key, value, weight = torch.randn(4, 1, 2, 200, dim, device=gpu).bfloat16()

    def step(query, key, value, weight):
        leaves = [x.detach().requires_grad_() for x in (query, key, value)]
        out, lse = cat_attention(*leaves, block_size=9, return_lse=True)
        merged, _ = merge_attention([out, out], [lse, lse])
        return torch.autograd.grad(merged, leaves, weight)

    replay, grads = captured(gpu, step, query, key, value, weight)
    for tensor in (query, key, value, weight):
        tensor.normal_()
    replay()
    for result, expected in zip(grads, step(query, key, value, weight), strict=True):
        assert torch.equal(result, expected)


def test_attention_replays_with_other_sequences(gpu):
    query, key, value = torch.randn(3, 1, 2, 70, 64, device=gpu)
    slots = torch.randn(2, 1, 2, 20, 64, device=gpu)
    seqlens = torch.tensor([0, 70, 70], device=gpu)

    def attend(*inputs):
        return chunk_attention(*inputs[:5], chunk_size=8, cu_seqlens=inputs[5])

    inputs = (query, key, value, *slots, seqlens)
    replay, out = captured(gpu, attend, *inputs)
    for middle in (1, 33, 64):
        seqlens[1] = middle
        replay()
        assert torch.equal(out, attend(*inputs))


def sampled(x, s):
    return resampling.sample_without_replacement(x, 5, seed=s)


def merged_parts(logits, seed):
    first, second = logits.split(60, 1)
    parts = [
        logit_stats(first, vocab_start=0, seed=seed),
        logit_stats(second, vocab_start=60, seed=seed),
    ]
    return unmasking.merge_logit_stats(parts)


def in_place(operator, written):
    """Of copies of the first arguments, which it writes; returns them."""

    def call(*arguments):
        copies = [x.clone() for x in arguments[:written]]
        operator(*copies, *arguments[written:])
        return copies

    return call


WINNOW = torch.ops.winnow
NUMBERS, SEED = torch.randn(2, 100), torch.tensor(0)
ANCESTORS = torch.randint(0, 100, (2, 100))
QUERY, KEYS = torch.randn(2, 4, 1, 32), torch.randn(9, 2, 4, 32)
TABLE = torch.tensor([[4, 0, 8], [3, 2, 1]], dtype=torch.int32)
LENGTHS = torch.tensor([9, 12], dtype=torch.int32)
NEW, PLACES = torch.randn(2, 2, 3, 32), torch.tensor([[6, 7, 8], [9, 10, 11]])
CODES, SCALES = torch.randint(-127, 128, (9, 2, 4, 32)).to(torch.int8), torch.rand(9, 2)
BLOCKS = torch.tensor([0, 1, 2]), torch.tensor([5, 6, 7])
CALLS = {
    "log_mean_exp": (resampling.log_mean_exp, NUMBERS),
    "weight_entropy": (resampling.weight_entropy, NUMBERS),
    "conditional_size": (resampling.conditional_effective_sample_size, NUMBERS, NUMBERS),
    "next_temperature": (
        lambda x, beta: resampling.next_temperature(x, beta, 0.5),
        NUMBERS,
        torch.full((2,), 0.1),
    ),
    "without_replacement": (sampled, NUMBERS, SEED),
    "inclusion": (lambda x: resampling.inclusion_probabilities(x, 5), NUMBERS),
    "trace_ancestors": (resampling.trace_ancestors, ANCESTORS.expand(3, 2, 100)),
    "gather": (lambda x, a: resampling.gather_particles(x, a), NUMBERS, ANCESTORS),
    "gather_in_place": (in_place(resampling.gather_particles_, 1), NUMBERS, ANCESTORS),
    "random_numbers": (lambda s: WINNOW.uniforms(s, 3, 20), SEED),
    "merge_logit_stats": (merged_parts, NUMBERS, SEED),
    "linear_logit_stats": (
        lambda x, w, s: unmasking.linear_logit_stats(x, w, seed=s)[:7],
        torch.randn(3, 16),
        torch.randn(50, 16),
        SEED,
    ),
    "soft_embedding": (
        lambda x, e: unmasking.soft_embedding(x, e, mask_id=0),
        NUMBERS,
        torch.randn(100, 8),
    ),
    "select_positions": (
        lambda x, mask: unmasking.select_positions(x, mask, EntropyThreshold(1.0)),
        NUMBERS,
        torch.ones(2, 100, dtype=torch.bool),
    ),
    "block_diagonal": (lambda x: block_diagonal_attention(x, x, x, block_size=3), NEW),
    "quantised_attention": (
        lambda *x: kvcache.paged_attention(*x[:5], key_scales=x[5], value_scales=x[5]),
        *(QUERY, CODES, CODES, TABLE, LENGTHS, SCALES),
    ),
    "attention_mass": (kvcache.attention_mass, QUERY, KEYS, TABLE, LENGTHS),
    "block_summaries": (kvcache.block_summaries, KEYS, TABLE, LENGTHS),
    "update_summaries": (
        in_place(WINNOW.update_block_summaries_, 1),
        torch.zeros(9, 2, 32),
        KEYS,
        TABLE,
        LENGTHS,
        PLACES,
    ),
    "select_blocks": (
        lambda q, x, n, t: kvcache.score_select_blocks(
            q, x, 2, seq_lens=n, block_size=4, block_table=t
        ),
        QUERY,
        torch.randn(9, 2, 32),
        LENGTHS,
        TABLE,
    ),
    "write": (in_place(WINNOW.paged_write_, 2), KEYS, KEYS, NEW, NEW, TABLE, PLACES),
    "quantise": (
        in_place(WINNOW.paged_quantise_, 4),
        *(CODES, CODES, SCALES, SCALES, NEW, NEW, TABLE, PLACES),
    ),
    "copy_blocks": (in_place(WINNOW.copy_blocks_, 2), KEYS[None], KEYS[None], *BLOCKS),
    "compact": (
        in_place(WINNOW.compact_pages_, 1),
        KEYS[None],
        TABLE,
        torch.tensor([1, 4, 7, -1]).expand(1, 2, 1, 4),
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_operators_replay_with_other_numbers(gpu, name):
    function, *tensors = CALLS[name]
    arguments = [x.clone().to(gpu) for x in tensors]
    replay, result = captured(gpu, function, *arguments)
    for value in (1, 2):
        for x in arguments:
            if x.is_floating_point():
                x.mul_(0.5).add_(value / 8)
            elif x.dim() == 0:
                x.fill_(value)
        replay()
        for ours, theirs in zip(tensors_of(result), tensors_of(function(*arguments)), strict=True):
            assert torch.equal(ours, theirs)
