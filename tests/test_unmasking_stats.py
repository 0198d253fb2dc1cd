"""logit_stats against its definition, and at its edges."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torch_winnow import reference
from torch_winnow.reference.logit_stats import truncated
from torch_winnow.unmasking import LogitStats, logit_stats

INF = float("inf")
NAN = float("nan")
SHAPES = [(3,), (1, 1), (2, 15), (2, 16), (3, 17), (2, 3, 1000), (2, 1024), (2, 8192), (1, 8193),
          (2, 20001), (0, 5), (2, 0)]  # fmt: skip


def oracle(logits: torch.Tensor, **options: object) -> LogitStats:
    """The definition in float64 on the same (rounded) inputs."""
    for name in ("previous_logits", "unconditional_logits"):
        if name in options:
            options[name] = options[name].double()
    return reference.logit_stats(logits.double(), **options)


def assert_same(result: LogitStats, expected: LogitStats, rtol: float = 3e-5) -> None:
    for name, ours, theirs in zip(LogitStats._fields[:-1], result[:-1], expected[:-1], strict=True):
        if theirs is None:
            assert ours is None, name
        elif name in ("token", "argmax"):
            assert torch.equal(ours, theirs), name
        else:
            torch.testing.assert_close(
                ours.double(),
                theirs.double(),
                rtol=rtol,
                atol=rtol / 5,
                equal_nan=True,
                msg=lambda text, name=name: f"{name}: {text}",
            )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_definition(shape, dtype, device):
    logits = (4 * torch.randn(shape)).to(device, dtype)
    if shape[-1] == 0:
        stats = logit_stats(logits)
        assert stats.token.tolist() == [-1, -1]
        assert stats.entropy.isnan().all()
        return
    stats = logit_stats(logits, temperature=0.7)
    assert stats.entropy.dtype == torch.float32
    assert stats.token.dtype == stats.argmax.dtype == torch.int64
    assert all(field.shape == shape[:-1] for field in stats if field is not None)
    assert_same(stats, oracle(logits, temperature=0.7))


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.0},
        {"temperature": 0.1},
        {"temperature": 3.0, "suppress_ids": [0, 1500, 999, 999]},
        {"target_ids": torch.tensor([0, 7, 1500])},
        {"top_k": 1},
        {"top_k": 40, "temperature": 0.5},
        {"top_k": 10_000},
        {"top_p": 0.9},
        {"top_p": 1e-9},
        {"top_p": 1.0},
        {"top_k": 300, "top_p": 0.8, "target_ids": torch.tensor([0, 7, 1500])},
        {"top_p": 0.5, "statistics": "raw", "temperature": 0.3},
        {"min_p": 0.2, "temperature": 0.7, "target_ids": torch.tensor([0, 7, 1500])},
        {"min_p": 1.0},
        {"min_p": 0.0},
        {"min_p": 1e-3, "top_k": 30, "top_p": 0.95, "previous_logits": True},
        {"min_p": 0.05, "temperature": 0.0, "suppress_ids": [3]},
        {"min_p": 0.3, "statistics": "raw", "temperature": 2.0},
        {"previous_logits": True},
        {"previous_logits": True, "top_k": 5, "suppress_ids": torch.tensor([3])},
        {"unconditional_logits": True, "cfg_scale": 1.5},
        {"unconditional_logits": True, "cfg_scale": 0.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("wide", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_options_match_definition(options, wide):
    logits = (3 * torch.randn(3, 1501)).to(wide)
    other = (logits + torch.randn(3, 1501)).to(wide)
    options = {name: other if value is True else value for name, value in options.items()}
    stats = logit_stats(logits, **options)
    expected = oracle(logits, **options)
    assert_same(stats, expected, rtol=1e-9 if wide == torch.float64 else 3e-5)
    assert stats.entropy.dtype == (torch.float64 if wide == torch.float64 else torch.float32)


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(
        st.sampled_from([0.0, -0.0, 1.0, 1.5, -3.0, 40.0, -INF, 3e38, -3e38, 1e-40, NAN, INF]),
        min_size=1,
        max_size=40,
    ),
    temperature=st.sampled_from([0.0, 0.05, 1.0, 7.0]),
    top_k=st.sampled_from([None, 1, 3]),
    top_p=st.sampled_from([None, 0.3, 0.99]),
    min_p=st.sampled_from([None, 1e-9, 0.1, 1.0]),
    wide=st.sampled_from([torch.float32, torch.float64]),
)
def test_any_values(values, temperature, top_k, top_p, min_p, wide):
    logits = torch.tensor(values, dtype=wide)
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    stats = logit_stats(logits, **options)
    expected = oracle(logits, **options)
    assert stats.token == expected.token
    assert stats.argmax == expected.argmax
    for name in ("max_prob", "margin", "entropy", "log_prob"):
        torch.testing.assert_close(
            getattr(stats, name).double(), getattr(expected, name), rtol=2e-5, atol=5e-6,
            equal_nan=True,
        )  # fmt: skip
    if math.isfinite(float(stats.entropy)):
        assert stats.entropy >= 0
        assert 0 < stats.max_prob <= 1


def test_rows_that_a_mask_excludes_never_matter(dtype, device):
    logits = torch.randn(4, 3000).to(device, dtype)
    mask = torch.tensor([True, False, False, True], device=device)
    expected = logit_stats(logits, seed=1)
    for poison in (NAN, INF, -INF):
        poisoned = logits.clone()
        poisoned[1:3] = poison
        stats = logit_stats(
            poisoned, mask=mask, seed=1,
            target_ids=torch.tensor([0, -5, 10**9, 2], device=device),
            previous_logits=poisoned, unconditional_logits=poisoned, cfg_scale=0.0,
        )  # fmt: skip
        for name in ("log_prob", "max_prob", "margin", "entropy", "logsumexp"):
            assert torch.equal(getattr(stats, name)[mask], getattr(expected, name)[mask])
            assert (getattr(stats, name)[~mask] == 0).all()
        assert (stats.target_log_prob[~mask] == 0).all()
        assert stats.kl.tolist() == [0, 0, 0, 0]
        assert stats.token.tolist()[1:3] == [-1, -1]
        assert torch.equal(stats.token[mask], expected.token[mask])


@pytest.mark.parametrize("wide", [torch.float32, torch.float64])
def test_special_rows(wide, device):
    rows = torch.full((5, 2000), 1.0, dtype=wide, device=device)
    rows[0, 1234] = NAN
    rows[1] = -INF
    rows[2, [700, 1999]] = INF
    rows[3, 3] = INF
    rows[3, 4] = NAN
    for seed in (None, 3):
        stats = logit_stats(
            rows, seed=seed, target_ids=torch.zeros(5, dtype=torch.int64, device=device)
        )
        assert stats.token[:4].tolist() == [-1, -1, 700, -1]
        assert stats.argmax.tolist() == [-1, -1, 700, -1, 0]
        for field in (stats.log_prob, stats.max_prob, stats.margin, stats.entropy,
                      stats.target_log_prob):  # fmt: skip
            assert field[:4].isnan().all()
            assert not field[4].isnan()
        torch.testing.assert_close(
            stats.logsumexp,
            torch.tensor([NAN, -INF, INF, NAN, 1 + math.log(2000)], dtype=wide, device=device),
            equal_nan=True,
        )


def test_entropy_of_a_confident_row_with_a_long_tail(cpu_capability):
    # In one float32 sum each of these would vanish next to the 1 of the top.
    logits = torch.full((1, 126_464), -18.0)
    logits[0, 40_000] = 0.0
    stats = logit_stats(logits)
    expected = oracle(logits)
    torch.testing.assert_close(stats.entropy.double(), expected.entropy, rtol=3e-5, atol=0)
    torch.testing.assert_close(stats.logsumexp.double(), expected.logsumexp, rtol=0, atol=1e-6)


def test_shifts_and_ties():
    logits = torch.tensor([[2.0, 5.0, 5.0, -1.0]])
    stats = logit_stats(logits + 1e4, top_k=1)
    assert stats.argmax.item() == stats.token.item() == 1
    assert stats.max_prob.item() == 1.0
    assert stats.margin.item() == 1.0
    assert stats.entropy.item() == 0.0
    assert logit_stats(logits).margin.item() == 0.0
    uniform = torch.zeros(1, 10_000)
    assert logit_stats(uniform).argmax.item() == 0
    # Top-p takes the smallest set that reaches it: exactly half of equal tokens.
    assert logit_stats(uniform, top_p=0.5).entropy.item() == pytest.approx(math.log(5000))
    assert logit_stats(uniform, top_k=7).entropy.item() == pytest.approx(math.log(7))


@pytest.mark.parametrize("wide", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_min_p_keeps_the_boundary(wide, temperature):
    """At least min_p of the largest probability: exactly so much is kept, ties all."""
    p = torch.tensor([0.25, 0.5, 0.125, 0.0625, 0.0625, 0.0])
    logits = (temperature * p.log()).to(wide)
    least = math.exp((logits[3] - logits[1]).double().item() / temperature)
    for min_p, kept in ((0.125 if wide == torch.float32 else least, 5), (1.0, 1), (0.9, 1)):
        stats = logit_stats(logits.expand(50, 6), min_p=min_p, temperature=temperature, seed=1)
        share = p[:kept] if kept > 1 else p[1:2]
        expected = torch.special.entr(share / share.sum()).sum().item()
        assert stats.entropy[0].item() == pytest.approx(expected, abs=1e-2, rel=1e-2)
        assert stats.token.unique().numel() == kept
    above = logit_stats(logits, min_p=least * 1.01, temperature=temperature)
    assert above.entropy.item() == logit_stats(logits, top_k=3, temperature=temperature).entropy
    assert logit_stats(torch.zeros(9000), min_p=1.0).entropy.item() == pytest.approx(math.log(9000))
    # What is kept depends on the largest alone, not on what top-k and top-p leave.
    both = logit_stats(logits, min_p=0.2, top_p=0.3, temperature=temperature)
    assert both.max_prob.item() == 1.0


def test_kl_edges():
    current = torch.randn(2, 9000)
    assert logit_stats(current, previous_logits=current).kl.tolist() == [0, 0]
    previous = current.clone()
    previous[0, 8999] = -INF
    assert logit_stats(current, previous_logits=previous).kl.tolist()[0] == INF
    without = logit_stats(current, previous_logits=previous, suppress_ids=[8999]).kl
    assert without.tolist() == [0, 0]
    previous[1, 0] = NAN
    assert math.isnan(logit_stats(current, previous_logits=previous).kl[1])


def test_guidance_keeps_equal_infinities():
    logits = torch.tensor([[1.0, -INF, 2.0]])
    stats = logit_stats(logits, unconditional_logits=logits, cfg_scale=2.0)
    assert_same(stats, oracle(logits))


def test_strided_rows():
    logits = torch.randn(6, 50, 1200)[::2, 3:40]
    assert_same(logit_stats(logits), logit_stats(logits.contiguous()), rtol=0)
    transposed = torch.randn(40, 6).T
    assert_same(logit_stats(transposed), logit_stats(transposed.contiguous()), rtol=0)
    expanded = torch.randn(1, 300).expand(4, 300)
    assert_same(logit_stats(expanded), logit_stats(expanded.contiguous()), rtol=0)


def test_bitwise_equal_everywhere(on_every_capability, on_thread_counts, dtype):
    logits = (3 * torch.randn(5, 30_001)).to(dtype)
    previous = (logits + torch.randn(5, 30_001)).to(dtype)

    def run():
        processed = logit_stats(
            logits, temperature=0.8, top_p=0.9, seed=3, previous_logits=previous
        )
        raw = logit_stats(logits, temperature=0.7, statistics="raw", seed=4)
        return [field for field in (*processed, *raw) if field is not None]

    results = on_every_capability(run) + on_thread_counts(run)
    for result in results:
        for ours, first in zip(result, results[0], strict=True):
            assert torch.equal(ours, first)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.5},
        {"top_k": 20},
        {"top_p": 0.6, "temperature": 1.3},
        {"min_p": 0.02, "temperature": 1.3},
        {"temperature": 0.6, "statistics": "raw"},
    ],
    ids=str,
)
@pytest.mark.parametrize("wide", [torch.float32, torch.float64])
def test_draws_follow_the_distribution(options, wide):
    """Chi-square over tokens expected five times or more; fixed seed, rejects at p < 1e-4."""
    scipy_stats = pytest.importorskip("scipy.stats")
    vocab, draws = 9000, 8000 if wide == torch.float32 else 1000  # two slices
    logits = (2 * torch.randn(vocab)).to(wide)
    token = logit_stats(logits.expand(draws, vocab), seed=11, **options).token
    temperature = options.get("temperature", 1.0)
    truncation = [options.get(name) for name in ("top_k", "top_p", "min_p")]
    kept = truncated(logits.double(), temperature, *truncation)
    p = (kept / temperature).softmax(-1)
    counts = torch.bincount(token, minlength=vocab).double()
    assert counts[p == 0].sum() == 0
    expected = draws * p
    often = expected >= 5
    statistic = ((counts - expected)[often] ** 2 / expected[often]).sum()
    rest, rest_expected = counts[~often].sum(), expected[~often].sum()
    statistic += (rest - rest_expected) ** 2 / rest_expected.clamp(min=1)
    assert scipy_stats.chi2.sf(statistic.item(), int(often.sum())) > 1e-4


def test_draws_are_exact_in_the_tail():
    """13.8 nats below the top a token comes once in 10^6; its mass is spread over 8000 such."""
    vocab = 8001
    for top in (0, vocab - 1):  # the tail after and before the top in the vocabulary
        logits = torch.full((vocab,), -13.8)
        logits[top] = 0.0
        share = 8000 * math.exp(-13.8)
        share /= 1 + share
        token = logit_stats(logits.expand(40_000, vocab), seed=5).token
        drawn = (token != top).sum().item()
        # Binomial: 5 standard deviations, an error rate under 1e-6.
        assert abs(drawn - 40_000 * share) < 5 * math.sqrt(40_000 * share)


def test_draws_are_keyed_by_seed_and_row():
    logits = torch.randn(6, 500)
    token = logit_stats(logits, seed=1).token
    assert torch.equal(logit_stats(logits, seed=torch.tensor(1)).token, token)
    assert not torch.equal(logit_stats(logits, seed=2).token, token)
    assert torch.equal(logit_stats(logits[:3], seed=1).token, token[:3])
    assert torch.equal(logit_stats(logits.view(2, 3, 500), seed=1).token.flatten(), token)
    first = logit_stats(logits, generator=torch.Generator().manual_seed(4)).token
    second = logit_stats(logits, generator=torch.Generator().manual_seed(4)).token
    assert torch.equal(first, second)
    assert torch.equal(logit_stats(logits, seed=1, temperature=0.0).token, logits.argmax(-1))
    same = logits[:1].expand(64, 500)
    assert logit_stats(same, seed=1).token.unique().numel() > 10


def test_opcheck_and_compile():
    logits = torch.randn(2, 3, 40)
    ids = torch.zeros(2, 3, dtype=torch.int64)
    torch.library.opcheck(
        torch.ops.winnow.logit_stats.default,
        (logits, ids == 0, 0.7, torch.tensor([1]), ids, logits, logits, 0.5, 5, 0.9, 0.1,
         torch.tensor(3), False),
    )  # fmt: skip
    torch.library.opcheck(
        torch.ops.winnow.logit_stats.default,
        (logits, None, 1.0, None, None, None, None, 0.0, None, None, None, None, True),
    )
    compiled = torch.compile(logit_stats, fullgraph=True)
    assert_same(compiled(logits, top_k=3), logit_stats(logits, top_k=3), rtol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"logits": torch.zeros(2, 3, dtype=torch.int64)}, "logits: expected float32.*got int64"),
        ({"logits": torch.tensor(1.0)}, r"logits: expected \(\.\.\., V\), got a scalar"),
        ({"mask": torch.ones(3, dtype=torch.bool)}, r"mask: expected one for each row.*\(3,\)"),
        ({"mask": torch.ones(2)}, "mask: expected bool, got float32"),
        ({"temperature": -1.0}, "temperature: expected a finite number >= 0, got -1"),
        ({"temperature": NAN}, "temperature: expected a finite number"),
        ({"suppress_ids": [3]}, r"suppress_ids: expected ids in \[0, 3\), got 3"),
        ({"suppress_ids": [-1]}, r"suppress_ids: expected ids in \[0, 3\), got -1"),
        ({"target_ids": torch.tensor([0, 3])}, r"target_ids: expected ids in \[0, 3\).*got 3"),
        ({"target_ids": torch.tensor([0.0, 1.0])}, "target_ids: expected int64, got float32"),
        ({"previous_logits": torch.zeros(2, 4)}, "previous_logits: expected the shape of logits"),
        ({"unconditional_logits": torch.zeros(2, 3).half(), "cfg_scale": 1.0},
         "unconditional_logits: expected float32, got float16"),
        ({"cfg_scale": INF, "unconditional_logits": torch.zeros(2, 3)}, "cfg_scale: expected a"),
        ({"top_k": 0}, "top_k: expected at least 1, got 0"),
        ({"top_p": 0.0}, r"top_p: expected a number in \(0, 1\], got 0"),
        ({"top_p": 1.5}, r"top_p: expected a number in \(0, 1\], got 1.5"),
        ({"min_p": -0.1}, r"min_p: expected a number in \[0, 1\], got -0.1"),
        ({"min_p": NAN}, r"min_p: expected a number in \[0, 1\], got nan"),
        ({"statistics": "both"}, "statistics: expected 'processed' or 'raw', got 'both'"),
        ({"seed": 2**63}, "seed: expected a 64-bit signed integer"),
        ({"seed": torch.zeros(2, dtype=torch.int64)}, "seed: expected one number"),
        ({"seed": 1, "generator": torch.Generator()}, "seed: expected either a seed or"),
    ],
)  # fmt: skip
def test_errors_name_the_argument(options, message):
    options = {"logits": torch.zeros(2, 3), **options}
    with pytest.raises(ValueError, match=message):
        logit_stats(options.pop("logits"), **options)
