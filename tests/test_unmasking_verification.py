"""speculative_verify against its definition, on any input."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from test_unmasking_verification_exact import decided
from torch_winnow import reference
from torch_winnow.unmasking import Verification, speculative_verify

INF = float("inf")
NAN = float("nan")


def assert_same(result: Verification, expected: Verification, rtol: float = 3e-5) -> None:
    for name in ("accepted", "token", "tokens"):
        assert torch.equal(getattr(result, name), getattr(expected, name)), name
    torch.testing.assert_close(
        result.log_prob.double(), expected.log_prob.double(), rtol=rtol, atol=rtol, equal_nan=True
    )


@pytest.mark.parametrize("vocab", [1, 5, 1024, 8193])
def test_greedy_matches_the_definition(vocab, dtype, cpu_capability):
    target = torch.randn(6, 4, vocab).to(dtype)
    drafts = target[:, :3].argmax(-1)
    drafts[1, 0] = drafts[2, 1] = drafts[3, 2] = vocab - 1
    lengths = torch.tensor([3, 3, 3, 2, 0, 1])
    for options in ({}, {"lengths": lengths}):
        result = speculative_verify(drafts, None, target, temperature=0.0, **options)
        expected = reference.speculative_verify(
            drafts, None, target.double(), temperature=0.0, **options
        )
        assert_same(result, expected)
        assert result.log_prob.dtype == torch.float32


def test_structure_and_log_probs(dtype, cpu_capability):
    batch, steps, vocab = 40, 4, 1500
    target = torch.randn(batch, steps + 1, vocab).to(dtype)
    q = (target[:, :steps] + 0.5 * torch.randn(batch, steps, vocab)).to(dtype)
    drafts = (q.float() / 0.7).softmax(-1).view(-1, vocab).multinomial(1).view(batch, steps)
    result = speculative_verify(drafts, q, target, temperature=0.7, seed=9)
    log_p = (target.double() / 0.7).log_softmax(-1)
    assert 0 < result.accepted.min() + 1 <= result.accepted.max()
    for b in range(batch):
        n = int(result.accepted[b])
        emitted = [*drafts[b, :n].tolist(), int(result.token[b])]
        assert result.tokens[b].tolist() == emitted + [-1] * (steps - n)
        wanted = torch.stack([log_p[b, j, token] for j, token in enumerate(emitted)])
        torch.testing.assert_close(
            result.log_prob[b, : n + 1].double(), wanted, rtol=2e-5, atol=2e-5
        )
        assert (result.log_prob[b, n + 1 :] == 0).all()
        if n < steps:
            assert result.token[b] != drafts[b, n] or target[b, n].isnan().any()


def test_equal_distributions_are_always_accepted():
    logits = torch.randn(500, 4, 300)
    drafts = logits[:, :3].softmax(-1).view(-1, 300).multinomial(1).view(500, 3)
    for temperature in (0.3, 1.0):
        q = logits[:, :3].clone()
        result = speculative_verify(drafts, q, logits, temperature=temperature, seed=1)
        assert (result.accepted == 3).all()


def test_supports_that_do_not_meet():
    p = torch.tensor([[[0.0, -INF, 0.0], [0.0, 0.0, 0.0]]]).expand(400, 2, 3)
    q = torch.tensor([[[-INF, 0.0, -INF]]]).expand(400, 1, 3)
    result = speculative_verify(torch.ones(400, 1, dtype=torch.int64), q, p, seed=0)
    assert (result.accepted == 0).all()
    assert set(result.token.tolist()) == {0, 2}
    # A draft that the draft's logits exclude: accepted where the target has it.
    result = speculative_verify(torch.zeros(400, 1, dtype=torch.int64), q, p, seed=0)
    assert (result.accepted == 1).all()
    # A certain draft without any probability, and with all of it.
    result = speculative_verify(torch.ones(400, 1, dtype=torch.int64), None, p, seed=0)
    assert set(result.token.tolist()) == {0, 2}
    sure = torch.tensor([[[-INF, 0.0, -INF]]]).expand(400, 1, 3)
    result = speculative_verify(torch.ones(400, 1, dtype=torch.int64), None, sure, seed=0)
    assert (result.accepted == 1).all()
    assert (result.token == -1).all()


@pytest.mark.parametrize("bad", [NAN, INF])
@pytest.mark.parametrize("wide", [torch.float32, torch.float64])
def test_rows_without_a_distribution_end_the_step(bad, wide):
    target = torch.zeros(4, 3, 10, dtype=wide)
    target[:, :, 1] = 50.0
    q = target[:, :2].clone()
    drafts = torch.ones(4, 2, dtype=torch.int64)
    target[0, 0, 7] = bad
    target[1, 1] = -INF
    q[2, 1, 3] = bad
    target[3, 2, 0] = bad
    result = speculative_verify(drafts, q, target, seed=1)
    assert result.accepted.tolist() == [0, 1, 1, 2]
    assert result.token.tolist() == [-1] * 4
    assert result.log_prob.isnan().nonzero().tolist() == [[0, 0], [1, 1], [2, 1], [3, 2]]
    greedy = speculative_verify(drafts, q, target, temperature=0.0)
    assert greedy.accepted.tolist() == [0, 1, 2, 2]
    assert_same(greedy, reference.speculative_verify(drafts, q, target, temperature=0.0))


def test_rows_beyond_the_accepted_prefix_never_matter():
    target = torch.randn(30, 5, 40)
    q = torch.randn(30, 4, 40)
    drafts = torch.randint(0, 40, (30, 4))
    first = speculative_verify(drafts, q, target, seed=3)
    for b in range(30):
        n = int(first.accepted[b])
        target[b, n + 1 :] = NAN
        q[b, n + 1 :] = NAN
    assert_same(speculative_verify(drafts, q, target, seed=3), first, rtol=0)


def test_order_and_lengths_choose_rows():
    target = torch.randn(3, 6, 50)
    q = torch.randn(3, 6, 50)
    drafts = torch.randint(0, 50, (3, 6))
    order = torch.tensor([[5, 2, 0, -1], [1, -1, 9, 9], [-1, 0, 0, 0]])
    listed = order[:2].clamp(min=0, max=5)
    result = speculative_verify(drafts, q, target, order=order.clamp(max=5), seed=6)
    assert result.tokens.shape == (3, 4)
    assert result.tokens[2].tolist() == [-1] * 4
    assert result.accepted[2] == 0
    # The same as gathering the rows.
    for b, n in ((0, 3), (1, 1)):
        rows = listed[b, :n]
        args = (drafts, q, target)
        chain = [x[[b]][:, rows].expand(b + 1, *x[[b]][:, rows].shape[1:]) for x in args]
        gathered = speculative_verify(*chain, seed=6)
        assert result.tokens[b, :n].tolist() == gathered.tokens[b].tolist()
        assert result.accepted[b] == gathered.accepted[b]
    # The position after the last draft is the bonus token's; its draft token is never looked at.
    drafts[:] = target.argmax(-1)
    drafts[0, 0] = -7
    lengths = torch.tensor([2, 1, 0])
    order[1:, :2] = torch.tensor([[1, 4], [3, 1]])
    greedy = speculative_verify(
        drafts, None, target, order=order.clamp(max=5), lengths=lengths, temperature=0.0
    )
    assert greedy.accepted.tolist() == [2, 1, 0]
    best = target.argmax(-1)
    assert greedy.token.tolist() == [int(best[0, 0]), int(best[1, 4]), int(best[2, 3])]


@settings(max_examples=80, deadline=None)
@given(
    values=st.lists(
        st.sampled_from([0.0, -0.0, 1.0, 40.0, -INF, 3e38, -3e38, 1e-40, NAN, INF]),
        min_size=4,
        max_size=40,
    ),
    temperature=st.sampled_from([0.0, 1e-300, 1e-3, 1.0, 7.0, 1e300]),
    certain=st.booleans(),
    wide=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_any_values(values, temperature, certain, wide):
    vocab = len(values) // 4
    rows = torch.tensor(values[: 4 * vocab], dtype=wide).view(1, 4, vocab)
    target, q = rows[:, :2], rows[:, 2:]
    drafts = torch.zeros(1, 2, dtype=torch.int64)
    result = speculative_verify(
        drafts, None if certain else q, target, temperature=temperature, seed=1
    )
    n, token = int(result.accepted), int(result.token)
    assert (result.tokens[0, :n] == 0).all()
    assert (result.tokens[0, n + (token >= 0) :] == -1).all()
    for j, drawn in enumerate(result.tokens[0].tolist()):
        if drawn >= 0:
            assert target[0, j, drawn] > -INF
            assert not target[0, j].isnan().any()
    if temperature == 0:
        expected = reference.speculative_verify(drafts, None, target, temperature=0.0)
        assert torch.equal(result.tokens, expected.tokens)
    elif wide == torch.float64 and (target.amax(-1).isfinite() & q.amax(-1).isfinite()).all():
        p, q = ((x - x.amax(-1, keepdim=True)) / temperature for x in (target[0], q[0]))
        p, q = p.softmax(-1), q.softmax(-1)
        assert result.tokens[0].tolist() == decided(drafts[0], None if certain else q, p, 1, 0)


def test_bitwise_equal_everywhere(on_every_capability, on_thread_counts, dtype):
    batch, vocab = 12, 20_001
    target = (2 * torch.randn(batch, 3, vocab)).to(dtype)
    q = (target[:, :2] + torch.randn(batch, 2, vocab)).to(dtype)
    drafts = q.float().softmax(-1).view(-1, vocab).multinomial(1).view(batch, 2)

    def run():
        return speculative_verify(drafts, q, target, temperature=0.9, seed=3)

    results = on_every_capability(run) + on_thread_counts(run)
    assert len(results[0].accepted.unique()) > 1
    for result in results:
        for ours, first in zip(result, results[0], strict=True):
            assert torch.equal(ours, first)
    # Neither the batch's size nor what else is in it matters, nor how rows are strided.
    few = speculative_verify(drafts[:5], q[:5], target[:5], temperature=0.9, seed=3)
    assert torch.equal(few.tokens, results[0].tokens[:5])
    strided = torch.empty(batch, 3, 2 * vocab, dtype=dtype)[..., :vocab].copy_(target)
    again = speculative_verify(drafts.T.contiguous().T, q, strided, temperature=0.9, seed=3)
    assert torch.equal(again.tokens, results[0].tokens)


def test_draws_are_keyed_by_the_seed():
    target = torch.randn(50, 1, 100)
    none = torch.empty(50, 0, dtype=torch.int64)
    token = speculative_verify(none, None, target, seed=1).token
    assert torch.equal(speculative_verify(none, None, target, seed=torch.tensor(1)).token, token)
    assert not torch.equal(speculative_verify(none, None, target, seed=2).token, token)
    torch.manual_seed(3)
    first, second = (speculative_verify(none, None, target).token for _ in range(2))
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    assert torch.equal(speculative_verify(none, None, target).token, first)
    drawn = [
        speculative_verify(none, None, target, generator=torch.Generator().manual_seed(4)).token
        for _ in range(2)
    ]
    assert torch.equal(drawn[0], drawn[1])


@pytest.mark.parametrize("shape", [(0, 2, 5), (2, 0, 5), (2, 1, 0), (2, 3, 1)], ids=str)
def test_empty(shape):
    batch, rows, vocab = shape
    drafts = torch.zeros(batch, max(rows - 1, 0), dtype=torch.int64)
    if vocab == 0:
        drafts = drafts[:, :0]
    result = speculative_verify(drafts, None, torch.zeros(shape), seed=0)
    assert result.tokens.shape == (batch, rows)
    if rows == 0 or vocab == 0:
        assert (result.token == -1).all()


def test_no_graph_is_kept():
    logits = torch.randn(2, 3, 5, requires_grad=True)
    result = speculative_verify(torch.zeros(2, 2, dtype=torch.int64), logits[:, :2], logits, seed=0)
    assert not result.log_prob.requires_grad


def test_opcheck_and_compile():
    target, q = torch.randn(2, 3, 40), torch.randn(2, 2, 40)
    drafts = torch.randint(0, 40, (2, 2))
    op = torch.ops.winnow.speculative_verify.default
    torch.library.opcheck(op, (drafts, q, target, 0.7, drafts[:, 0] % 3, None, torch.tensor(3)))
    order = torch.tensor([[1], [-1]])
    torch.library.opcheck(op, (drafts, None, q, 0.0, None, order, None))
    compiled = torch.compile(speculative_verify, fullgraph=True)
    eager = speculative_verify(drafts, q, target, seed=torch.tensor(3))
    assert_same(compiled(drafts, q, target, seed=torch.tensor(3)), eager, rtol=0)
    compiled(drafts, q, target)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"draft_tokens": [1]}, r"draft_tokens: expected a tensor, got \[1\]"),
        ({"order": [1]}, r"order: expected a tensor or None, got \[1\]"),
        ({"draft_tokens": torch.zeros(2, 2)}, "draft_tokens: expected int64, got float32"),
        ({"draft_tokens": torch.zeros(3, 2).long()}, r"draft_tokens: expected B=2.*got \(3, 2\)"),
        ({"draft_tokens": torch.full((2, 2), 5)}, r"draft_tokens: expected ids in \[0, 5\).*got 5"),
        ({"target_logits": torch.zeros(2, 5)}, r"target_logits: expected \(B, T \+ 1, V\)"),
        ({"target_logits": torch.zeros(2, 4, 5)}, "target_logits: expected one row for each draft"),
        ({"target_logits": torch.zeros(2, 3, 5).long()}, "target_logits: expected float32.*int64"),
        ({"draft_logits": torch.zeros(2, 3, 5)}, r"draft_logits: expected \(2, 2, 5\)"),
        ({"draft_logits": torch.zeros(2, 2, 5).half()}, "draft_logits: expected float32, got flo"),
        ({"temperature": -1.0}, "temperature: expected a finite number >= 0, got -1"),
        ({"temperature": NAN}, "temperature: expected a finite number"),
        ({"lengths": torch.tensor([1, 3])}, r"lengths: expected numbers in \[0, 2\], got 3"),
        ({"lengths": torch.tensor([1])}, r"lengths: expected \(B,\) with B=2, got \(1,\)"),
        ({"lengths": torch.tensor([1.0, 1.0])}, "lengths: expected int64, got float32"),
        ({"order": torch.zeros(2, 2).long()}, "target_logits: expected one row for each of the 2"),
        ({"order": torch.full((2, 1), 2), "target_logits": torch.zeros(2, 2, 5)},
         r"order: expected positions in \[0, 2\), or -1 for none, got 2"),
        ({"order": torch.tensor([[0, 1], [1, 1]]), "target_logits": torch.zeros(2, 2, 5)},
         "order: expected every position once, got 1 twice"),
        ({"order": torch.zeros(3, 1).long(), "target_logits": torch.zeros(2, 2, 5)},
         r"order: expected \(B, S\) with B=2, got \(3, 1\)"),
        ({"seed": torch.zeros(2).long()}, "seed: expected one number"),
        ({"seed": 2**63}, "seed: expected a 64-bit signed integer"),
        ({"seed": 1, "generator": torch.Generator()}, "seed: expected either a seed or"),
    ],
)  # fmt: skip
def test_errors_name_the_argument(options, message):
    options = {
        "draft_tokens": torch.zeros(2, 2, dtype=torch.int64),
        "draft_logits": None,
        "target_logits": torch.zeros(2, 3, 5),
        **options,
    }
    with pytest.raises(ValueError, match=message):
        speculative_verify(**options)


def test_the_operator_wants_a_seed():
    op = torch.ops.winnow.speculative_verify
    with pytest.raises(ValueError, match="seed: expected one where temperature > 0"):
        op(torch.zeros(1, 0).long(), None, torch.zeros(1, 1, 3), 1.0, None, None, None)
