"""Captured in a CUDA graph, the operators replay with new inputs and new seeds."""

from __future__ import annotations

import pytest
import torch

import torch_winnow
from torch_winnow import kvcache
from torch_winnow.attention import cat_attention, chunk_attention, merge_attention
from torch_winnow.resampling import effective_sample_size, resample
from torch_winnow.unmasking import EntropyThreshold, logit_stats, speculative_verify, unmask_step_

pytestmark = pytest.mark.skipif(
    not (torch.cuda.is_available() and torch_winnow.build_info().cuda_library),
    reason="needs a GPU",
)


def captured(function, *arguments):
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function(*arguments)  # warms up outside of the capture
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = function(*arguments)
    return graph, result


@pytest.mark.parametrize("options", [{}, {"top_k": 20, "top_p": 0.9}], ids=str)
def test_logit_stats_replays_with_new_seeds(options):
    logits = torch.randn(8, 9000, device="cuda")
    seed = torch.tensor(0, device="cuda")
    graph, stats = captured(lambda x, s: logit_stats(x, seed=s, **options), logits, seed)
    drawn = set()
    for value in (1, 2, 3):
        seed.fill_(value)
        logits.normal_()
        graph.replay()
        expected = logit_stats(logits, seed=value, **options)
        assert torch.equal(stats.token, expected.token)
        assert torch.equal(stats.entropy, expected.entropy)
        drawn.add(tuple(stats.token.tolist()))
    assert len(drawn) == 3


def test_paged_attention_replays_with_longer_sequences():
    key, value = torch.randn(2, 40, 2, 16, 64, device="cuda", dtype=torch.bfloat16)
    table = torch.arange(40, dtype=torch.int32, device="cuda").view(2, 20)
    lengths = torch.tensor([5, 100], dtype=torch.int32, device="cuda")
    query = torch.randn(2, 8, 1, 64, device="cuda", dtype=torch.bfloat16)
    arguments = (query, key, value, table, lengths)
    graph, out = captured(kvcache.paged_attention, *arguments)
    for length in (7, 64, 320):
        lengths.fill_(length)
        graph.replay()
        assert torch.equal(out, kvcache.paged_attention(*arguments))


def test_effective_sample_size_replays():
    log_weights = torch.randn(3, 200_000, device="cuda")
    graph, ess = captured(effective_sample_size, log_weights)
    log_weights.normal_()
    graph.replay()
    assert torch.equal(ess, effective_sample_size(log_weights))


@pytest.mark.parametrize("scheme", ["systematic", "killing", "ssp", "optimal"])
@pytest.mark.parametrize("shape", [(50, 8), (2, 100_000)], ids=str)
def test_resample_replays_with_new_seeds(scheme, shape):
    log_weights = torch.randn(shape, device="cuda")
    seed = torch.tensor(0, device="cuda")
    graph, result = captured(lambda x, s: resample(x, scheme=scheme, seed=s), log_weights, seed)
    for value in (1, 2):
        seed.fill_(value)
        log_weights.normal_()
        graph.replay()
        expected = resample(log_weights, scheme=scheme, seed=value)
        assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))


def test_an_unmasking_step_replays():
    tokens = torch.full((2, 16), 99, device="cuda")
    logits = torch.randn(2, 16, 100, device="cuda")

    def step(tokens, logits):
        return unmask_step_(tokens, logits, mask_id=99, rule=EntropyThreshold(3.0)).count

    graph, count = captured(step, tokens, logits)
    for _ in range(3):
        logits.normal_().mul_(3)
        tokens.fill_(99)
        graph.replay()
        written = tokens.clone()
        tokens.fill_(99)
        assert torch.equal(step(tokens, logits), count)
        assert torch.equal(tokens, written)


def test_a_verification_replays_with_new_seeds():
    target, draft = torch.randn(8, 3, 9000, device="cuda"), torch.randn(8, 2, 9000, device="cuda")
    drafts = torch.randint(0, 9000, (8, 2), device="cuda")
    seed = torch.tensor(0, device="cuda")
    verify = lambda p, q, s: speculative_verify(drafts, q, p, seed=s)  # noqa: E731
    graph, result = captured(verify, target, draft, seed)
    for value in (1, 2):
        seed.fill_(value)
        target.normal_()
        graph.replay()
        expected = speculative_verify(drafts, draft, target, seed=value)
        assert torch.equal(result.tokens, expected.tokens)


@pytest.mark.parametrize("dim", [40, 128])
def test_attention_and_its_gradient_replay(dim):
    query, key, value, weight = torch.randn(4, 1, 2, 200, dim, device="cuda").bfloat16()

    def step(query, key, value, weight):
        leaves = [x.detach().requires_grad_() for x in (query, key, value)]
        out, lse = cat_attention(*leaves, block_size=9, return_lse=True)
        merged, _ = merge_attention([out, out], [lse, lse])
        return torch.autograd.grad(merged, leaves, weight)

    graph, grads = captured(step, query, key, value, weight)
    for tensor in (query, key, value, weight):
        tensor.normal_()
    graph.replay()
    for result, expected in zip(grads, step(query, key, value, weight), strict=True):
        assert torch.equal(result, expected)


def test_attention_replays_with_other_sequences():
    query, key, value = torch.randn(3, 1, 2, 70, 64, device="cuda")
    slots = torch.randn(2, 1, 2, 20, 64, device="cuda")
    seqlens = torch.tensor([0, 70, 70], device="cuda")

    def attend(*inputs):
        return chunk_attention(*inputs[:5], chunk_size=8, cu_seqlens=inputs[5])

    inputs = (query, key, value, *slots, seqlens)
    graph, out = captured(attend, *inputs)
    for middle in (1, 33, 64):
        seqlens[1] = middle
        graph.replay()
        assert torch.equal(out, attend(*inputs))
