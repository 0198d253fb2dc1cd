"""Each preset against a straightforward version of its published sampler, step by step.

Temperature 0, so token for token; batches of one and more; and what was written at which step.
"""

from __future__ import annotations

import math

import pytest
import torch

from tiny_diffusion import TinyBidirectional
from torch_winnow.unmasking import (
    ConfidenceFactor,
    ConfidenceThreshold,
    DraftVerify,
    Remasking,
    ShadowBlock,
    generate,
    presets,
)

VOCAB = 24
MASK = VOCAB - 1
GEN = 32


@pytest.fixture(scope="module")
def model():
    tiny = TinyBidirectional(VOCAB)
    tiny.head.data[:, MASK] = 0.0
    tiny.head.data *= 2.5
    tiny.requires_grad_(False)

    def run(tokens, attention_mask=None, position_ids=None):
        logits = tiny.logits(tokens, attention_mask, position_ids)
        logits[..., MASK] = -torch.inf  # no published sampler means to write it
        return logits

    return run


def prompts(batch):
    generator = torch.Generator().manual_seed(batch)
    given = torch.randint(0, MASK, (batch, 6), generator=generator)
    return torch.nn.functional.pad(given, (0, GEN), value=MASK)


def check(model, sampler, expected, batch, **options):
    """``expected(row)`` yields the row after each step."""
    tokens = prompts(batch)
    result = generate(model, tokens, mask_id=MASK, **sampler, **options)
    calls = []
    for b in range(batch):
        row = tokens[b].clone()
        step_map = torch.full_like(row, -1)
        for step, after in enumerate(expected(row.clone())):
            step_map[(after != row) & (after != MASK)] = step
            step_map[(after == MASK)] = -1
            row = after
        assert torch.equal(result.tokens[b], row)
        assert torch.equal(result.step_map[b], step_map)
        calls.append(step + 1)
    assert result.calls == max(calls)
    return result


def ranked(score, masked):
    """The masked positions, best first, ties to the left."""
    return sorted(masked, key=lambda i: (-score[i], i))


def masks_of(row, start=0, end=None):
    return [i for i in range(start, len(row) if end is None else end) if row[i] == MASK]


def probabilities(model, row):
    return model(row[None])[0].softmax(-1)


def by_blocks(model, row, block_length, choose):
    """Semi-autoregressive decoding: ``choose(p, masks, step)`` says what to write."""
    start = masks_of(row)[0]
    for begin in range(start, len(row), block_length):
        step = 0
        while masks := masks_of(row, begin, min(begin + block_length, len(row))):
            p = probabilities(model, row)
            row = row.clone()
            for i in choose(p, masks, step):
                row[i] = p[i].argmax()
            yield row
            step += 1


def confidences(p):
    return p.max(-1).values.tolist()


def entropies(p):
    return [-sum(x * math.log(x) for x in row if x > 0) for row in p.tolist()]


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(("steps", "block_length"), [(32, 32), (12, 8), (32, 8), (9, 32)])
def test_llada(model, batch, steps, block_length):
    per_block = steps // (GEN // block_length)

    def choose(p, masks, step):
        base, remainder = divmod(block_length, per_block)
        count = base + (1 if step < remainder else 0)
        return ranked(confidences(p), masks)[:count]

    sampler = presets.llada(gen_length=GEN, steps=steps, block_length=block_length)
    check(model, sampler, lambda row: by_blocks(model, row, block_length, choose), batch)


def test_llada_guidance(model):
    def guided(row):
        given = row != MASK
        for _ in range(16):
            conditional = model(row[None])[0]
            free = model(row.masked_fill(given, MASK)[None])[0]
            p = torch.where(conditional == free, free, free + 2.0 * (conditional - free)).softmax(
                -1
            )
            row = row.clone()
            for i in ranked(confidences(p), masks_of(row))[:2]:
                row[i] = p[i].argmax()
            yield row

    sampler = presets.llada(gen_length=GEN, steps=16, block_length=GEN, cfg_scale=1.0)
    check(model, sampler, guided, 2)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("alg", ["maskgit_plus", "topk_margin", "entropy"])
@pytest.mark.parametrize(("steps", "top_p"), [(10, None), (50, 0.8), (32, None)])
def test_dream(model, batch, alg, steps, top_p):
    def expected(row):
        time = torch.linspace(1, 1e-3, steps + 1)
        for i in range(steps):
            masks = masks_of(row)
            count = len(masks)
            if i < steps - 1:
                count = int(torch.tensor(float(count)) * (1 - time[i + 1] / time[i]))
            if not count:
                continue
            p = probabilities(model, row)
            if top_p is not None:
                ordered, index = p.sort(descending=True)
                keep = (ordered.cumsum(-1) - ordered <= top_p).double()
                p = torch.zeros_like(p).scatter(-1, index, ordered * keep)
                p = p / p.sum(-1, keepdim=True)
            two = p.topk(2).values
            score = {
                "maskgit_plus": two[:, 0].tolist(),
                "topk_margin": (two[:, 0] - two[:, 1]).tolist(),
                "entropy": [-h for h in entropies(p)],
            }[alg]
            row = row.clone()
            for j in ranked(score, masks)[:count]:
                row[j] = p[j].argmax()
            yield row

    sampler = presets.dream(gen_length=GEN, steps=steps, alg=alg, top_p=top_p)
    check(model, sampler, expected, batch)


@pytest.mark.parametrize("batch", [1, 3])
def test_fast_dllm_threshold(model, batch):
    def choose(p, masks, step):
        c = confidences(p)
        return {ranked(c, masks)[0]} | {i for i in masks if c[i] >= 0.6}

    sampler = presets.fast_dllm(threshold=0.6, block_length=8)
    result = check(model, sampler, lambda row: by_blocks(model, row, 8, choose), batch)
    assert result.calls < GEN


@pytest.mark.parametrize("batch", [1, 3])
def test_fast_dllm_factor(model, batch):
    def choose(p, masks, step):
        c = confidences(p)
        order = ranked(c, masks)
        accepted = [n for n in range(1, len(order) + 1) if (n + 1) * (1 - c[order[n - 1]]) < 1.0]
        return order[: max(accepted, default=1)]

    sampler = presets.fast_dllm(factor=1.0, block_length=16)
    check(model, sampler, lambda row: by_blocks(model, row, 16, choose), batch)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("history", [1, 2, 3])
def test_klass(model, batch, history):
    def expected(row):
        last, divergences = None, []

        def choose(p, masks, step):
            nonlocal last
            kl = torch.full((len(p),), math.inf)
            if last is not None:
                kl = torch.where(p > 0, p * (p.log() - last.log()), 0.0).sum(-1)
            last = p
            divergences.append(kl)
            c = confidences(p)
            if step >= history - 1 and len(divergences) >= history:
                recent = torch.stack(divergences[-history:])
                ready = [i for i in masks if c[i] > 0.5 and bool((recent[:, i] < 0.2).all())]
                if ready:
                    return ready
            return ranked(c, masks)[:1]

        yield from by_blocks(model, row, 16, choose)

    sampler = presets.klass(threshold=0.5, kl_threshold=0.2, history=history, block_length=16)
    result = check(model, sampler, expected, batch)
    assert result.calls < GEN


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("most", [None, 2])
def test_med(model, batch, most):
    def choose(p, masks, step):
        h = entropies(p)
        order = sorted(masks, key=lambda i: (h[i], i))
        return [i for i in order if h[i] < 0.9][:most] or order[:1]

    sampler = presets.med(threshold=0.9, max_tokens=most)
    result = check(model, sampler, lambda row: by_blocks(model, row, GEN, choose), batch)
    assert result.calls < GEN


@pytest.mark.parametrize("batch", [1, 3])
def test_ar_med(model, batch):
    def choose(p, masks, step):
        h = entropies(p)
        run = next((n for n, i in enumerate(masks) if h[i] >= 1.2), len(masks))
        return masks[: max(run, 1)]

    sampler = presets.ar_med(threshold=1.2)
    check(model, sampler, lambda row: by_blocks(model, row, GEN, choose), batch)


@pytest.mark.parametrize("batch", [1, 3])
def test_eb(model, batch):
    def choose(p, masks, step):
        h = entropies(p)
        order = sorted(masks, key=lambda i: (h[i], i))
        accepted = [
            n
            for n in range(1, len(order) + 1)
            if sum(h[i] for i in order[:n]) - h[order[n - 1]] <= 0.7
        ]
        return order[: max(accepted)]

    sampler = presets.eb(gamma=0.7, block_length=16)
    result = check(model, sampler, lambda row: by_blocks(model, row, 16, choose), batch)
    assert result.calls < GEN


@pytest.mark.parametrize("batch", [1, 3])
def test_sdlm(model, batch):
    def expected(row):
        while masks := masks_of(row):
            window = masks_of(row, masks[0], min(masks[0] + 4, len(row)))
            p = probabilities(model, row)
            c = confidences(p)
            run = next((n for n, i in enumerate(window) if c[i] < 0.5), len(window))
            row = row.clone()
            for i in window[: max(run, 1)]:
                row[i] = p[i].argmax()
            yield row

    check(model, presets.sdlm(threshold=0.5), expected, batch)


def wino(model, row, block_length, draft, verify):
    """The published loop: shadows appended, drafts accepted, doubtful tokens masked again."""
    length, start = len(row), masks_of(row)[0]
    for begin in range(start, length, block_length):
        end = begin + block_length
        sees = torch.ones(length + block_length, length + block_length, dtype=torch.bool)
        for i in range(length):
            sees[i, length:] = False
        for j in range(block_length):
            sees[length + j, begin + j] = False
        places = torch.tensor([*range(length), *range(begin, end)])
        last = 30
        while masks := masks_of(row, begin, end):
            written = [i for i in range(begin, end) if row[i] != MASK]
            extended = torch.cat([row, torch.full((block_length,), MASK)])
            p = model(extended[None], sees[None, None], places[None])[0].softmax(-1)
            c = confidences(p)
            order = ranked(c, masks)
            most = min(max(int(len(masks) * 0.7), 5), 20)
            accepted = [i for i in order if c[i] > draft][:most] or order[:1]
            remask = []
            if len(accepted) > 1:
                again = {i: float(p[length + i - begin, row[i]]) for i in written}
                remask = [i for i in written if again[i] < verify]
                if len(remask) >= last:
                    remask = sorted(written, key=lambda i: (again[i], i))[: last - 1]
            row = row.clone()
            for i in accepted:
                row[i] = p[i].argmax()
            row[remask] = MASK
            last = len(accepted)
            yield row


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(("block_length", "draft"), [(32, 0.3), (16, 0.2), (8, 0.4)])
def test_wino(model, batch, block_length, draft):
    sampler = presets.wino(draft=draft, verify=0.7, block_length=block_length)
    rows = [[*wino(model, row, block_length, draft, 0.7)] for row in prompts(batch)]
    again = sum(
        int(((a != MASK) & (b == MASK)).sum())
        for row in rows
        for a, b in zip(row, row[1:], strict=False)
    )
    assert again > 0  # tokens are taken back in this test
    check(
        ShadowBlock(model), sampler, lambda row: wino(model, row, block_length, draft, 0.7), batch
    )


def test_a_shadow_does_not_see_its_token(model):
    """The prediction of a written token is the same whatever it is, and masks' are untouched."""
    calls = []

    def watch(tokens, context):
        logits = ShadowBlock(model)(tokens, context)
        calls.append((tokens, context, logits))
        return logits

    generate(watch, prompts(2), mask_id=MASK, **presets.wino(draft=0.3, block_length=12))
    for tokens, context, logits in calls:
        masked = tokens == MASK
        assert torch.allclose(logits[masked], model(tokens)[masked], rtol=1e-12, atol=1e-12)
        start, end = context.window[0].tolist()
        written = [i for i in range(start, end) if tokens[0, i] != MASK]
        for i in written[:2]:
            other = tokens.clone()
            other[0, i] = (other[0, i] + 1) % MASK
            assert torch.allclose(ShadowBlock(model)(other, context)[0, i], logits[0, i])


def test_defaults_are_the_published_ones():
    assert presets.wino()["rule"] == DraftVerify(0.6, 0.9)
    assert presets.fast_dllm()["rule"] == ConfidenceThreshold(0.9)
    assert presets.fast_dllm(factor=1.0)["rule"] == ConfidenceFactor(1.0)
    assert presets.remdm()["rule"] == Remasking(1024, 0.008, "cap")
    assert presets.remdm(schedule="rescale")["rule"] == Remasking(1024, 0.015, "rescale")
    assert presets.remdm(schedule="conf")["rule"] == Remasking(1024, 0.0, "conf")
    assert presets.remdm()["top_p"] == 0.9
    assert presets.dream(gen_length=8)["rule"] == Remasking(512)
    assert presets.klass()["rule"].history == 2
    assert presets.sdlm()["sliding"]


def test_drawing_presets_decode(model):
    for sampler in (
        presets.llada(gen_length=GEN, steps=8, block_length=16, temperature=0.7),
        presets.llada(gen_length=GEN, steps=8, block_length=16, remasking="random"),
        presets.dream(gen_length=GEN, steps=8, temperature=0.4, top_p=0.9),
        presets.dream(gen_length=GEN, steps=8, alg="entropy", alg_temp=0.2),
        presets.remdm(steps=16, eta=0.2),
        presets.remdm(steps=16, schedule="conf"),
    ):
        result = generate(model, prompts(2), mask_id=MASK, seed=1, **sampler)
        assert not (result.tokens == MASK).any()
        assert result.calls <= 16


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: presets.llada(gen_length=10, block_length=4), "gen_length: expected a multiple"),
        (lambda: presets.llada(steps=7, block_length=32), "steps: expected a multiple of the 4"),
        (lambda: presets.llada(remasking="high"), "remasking: expected one of low_confidence"),
        (lambda: presets.dream(gen_length=8, alg="maskgit"), "alg: expected one of origin"),
        (lambda: presets.dream(gen_length=0, alg="entropy"), "gen_length: expected at least 1"),
        (lambda: presets.dream(gen_length=8, alg_temp=0.1), "alg_temp: expected None with alg='"),
        (
            lambda: presets.dream(gen_length=8, alg="entropy", alg_temp=-1),
            "alg_temp: expected a number >= 0, got -1",
        ),
        (lambda: presets.dream(gen_length=-5), "gen_length: expected at least 1, got -5"),
        (lambda: presets.dream(gen_length=5, eps=2), r"eps: expected a number in \[0, 1\], got 2"),
        (lambda: presets.llada(gen_length=0), "gen_length: expected at least 1, got 0"),
        (lambda: presets.llada(block_length=0), "block_length: expected at least 1, got 0"),
        (lambda: presets.llada(steps=0), "steps: expected at least 1, got 0"),
    ],
)
def test_presets_check_their_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()
