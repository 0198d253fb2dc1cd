"""soft_embedding against its definition, and at its edges."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import TOLERANCE
from torch_winnow import reference
from torch_winnow.unmasking import logit_stats, soft_embedding

INF = float("inf")
NAN = float("nan")


def check(logits: torch.Tensor, embedding: torch.Tensor, **options: object) -> torch.Tensor:
    result = soft_embedding(logits, embedding, **options)
    if options.get("mask_embedding") is not None:
        options["mask_embedding"] = options["mask_embedding"].double()
    expected = reference.soft_embedding(logits.double(), embedding.double(), **options)
    assert result.dtype == embedding.dtype
    assert result.shape == expected.shape
    torch.testing.assert_close(
        result.double(), expected, equal_nan=True, **TOLERANCE[embedding.dtype]
    )
    return result


@pytest.mark.parametrize("vocab", [1, 2, 17, 1000, 8192, 8193])
@pytest.mark.parametrize("width", [1, 16, 37])
def test_matches_definition(vocab, width, dtype, cpu_capability):
    logits = (4 * torch.randn(2, 3, vocab)).to(dtype)
    embedding = torch.randn(vocab + 1, width).to(dtype)
    check(logits, embedding, mask_id=vocab)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.0},
        {"temperature": 0.3, "mix": 1.0},
        {"temperature": 4.0, "top_p": 0.5},
        {"top_k": 1, "top_p": None},
        {"top_k": 40, "top_p": None, "mix": 1.0},
        {"top_k": 40, "top_p": 0.7},
        {"top_p": None},
        {"top_p": 1e-9},
        {"top_p": 1.0, "top_k": 10_000, "mix": 0.5},
        {"mix": 0.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("wide", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_options_match_definition(options, wide):
    logits = (3 * torch.randn(5, 1501)).to(wide)
    embedding = torch.randn(1501, 20).to(wide)
    check(logits, embedding, mask_embedding=torch.randn(20).to(wide), **options)


@pytest.mark.parametrize("of_logits", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("of_embedding", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_may_differ(of_logits, of_embedding):
    check(
        torch.randn(3, 200).to(of_logits),
        torch.randn(200, 33).to(of_embedding),
        mask_id=7,
        mix=0.9,
    )


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
def test_rounding_is_torchs(narrow, cpu_capability):
    """One certain token and mix 1: the embedding itself, in float32 scaled by one number."""
    values = torch.cat([torch.randn(500), 10 ** torch.empty(500).uniform_(-9, 4.7)])
    values = torch.cat([values, -values, torch.tensor([0.0, 65504, 65503, 6e-8, 6.1e-5])])
    mask_embedding = torch.zeros_like(values).to(narrow)
    exact = values.to(narrow)
    logits = torch.tensor([[0.0, -INF]])
    embedding = torch.stack([exact, mask_embedding])
    assert torch.equal(soft_embedding(logits, embedding, mask_id=1, mix=1.0)[0], exact)
    # Half of it: the product is exact in float32, so only the last rounding is left.
    half = soft_embedding(logits, embedding, mask_id=1, mix=0.5)[0]
    assert torch.equal(half, (0.5 * exact.float()).to(narrow))
    third = soft_embedding(logits, embedding, mask_id=1, mix=1 / 3)[0]
    assert torch.equal(third, (torch.tensor(1 / 3) * exact.float()).to(narrow))


def test_the_paper_by_hand():
    """alpha = mix (1 - H / log V), of the whole distribution; weights of the nucleus alone."""
    p = torch.tensor([[0.5, 0.3, 0.15, 0.05]])
    embedding = torch.eye(4)
    base = torch.full((4,), 10.0)
    result = soft_embedding(p.log(), embedding, mask_embedding=base, top_p=0.75, mix=0.2)
    entropy = float(torch.special.entr(p).sum())
    alpha = 0.2 * (1 - entropy / math.log(4))
    wanted = (1 - alpha) * base + alpha * torch.tensor([0.5, 0.3, 0, 0]) / 0.8
    torch.testing.assert_close(result[0], wanted)
    assert float(logit_stats(p.log()).entropy) == pytest.approx(entropy)
    uniform = soft_embedding(torch.zeros(1, 4), embedding, mask_embedding=base, mix=1.0)
    torch.testing.assert_close(uniform[0], base)


def test_only_the_nucleus_and_the_mask_are_read():
    logits = torch.full((1, 3000), -5.0)
    logits[0, [3, 2000]] = 9.0
    embedding = torch.full((3000, 8), NAN)
    embedding[[3, 2000]] = torch.randn(2, 8)
    base = torch.randn(8)
    assert soft_embedding(logits, embedding, mask_embedding=base).isfinite().all()
    # A share of zero leaves either out.
    none = soft_embedding(logits, embedding * NAN, mask_embedding=base, mix=0.0)
    assert torch.equal(none[0], base)
    logits[0, 2000] = -INF
    logits[0, torch.arange(3000) != 3] = -INF
    whole = soft_embedding(logits, embedding, mask_embedding=base * NAN, mix=1.0)
    assert torch.equal(whole[0], embedding[3])


@pytest.mark.parametrize("poison", [NAN, INF, -INF])
def test_rows_that_a_mask_excludes_never_matter(poison, dtype):
    logits = torch.randn(4, 500).to(dtype)
    embedding = torch.randn(500, 24).to(dtype)
    mask = torch.tensor([True, False, False, True])
    expected = soft_embedding(logits, embedding, mask_id=0)
    logits[1:3] = poison
    result = soft_embedding(logits, embedding, mask_id=0, mask=mask)
    assert torch.equal(result[mask], expected[mask])
    assert (result[~mask] == 0).all()


@pytest.mark.parametrize("wide", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_rows_without_a_distribution(wide):
    logits = torch.zeros(4, 100, dtype=wide)
    logits[0, 50] = NAN
    logits[1] = -INF
    logits[2, 3] = INF
    result = soft_embedding(logits, torch.ones(100, 17, dtype=wide), mask_id=0)
    assert result[:3].isnan().all()
    assert result[3].isfinite().all()


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(
        st.sampled_from([0.0, -0.0, 1.0, 1.5, -3.0, 40.0, -INF, 3e38, -3e38, 1e-40, NAN]),
        min_size=1,
        max_size=40,
    ),
    temperature=st.sampled_from([0.0, 0.05, 1.0, 7.0]),
    top_k=st.sampled_from([None, 1, 3]),
    top_p=st.sampled_from([None, 0.3, 0.99]),
    wide=st.sampled_from([torch.float32, torch.float64]),
)
def test_any_values(values, temperature, top_k, top_p, wide):
    logits = torch.tensor([values], dtype=wide)
    embedding = torch.randn(len(values), 5, dtype=wide)
    check(logits, embedding, mask_id=0, temperature=temperature, top_k=top_k, top_p=top_p, mix=0.7)


def test_bitwise_equal_everywhere(on_every_capability, on_thread_counts, dtype):
    logits = (3 * torch.randn(6, 20_001)).to(dtype)
    embedding = torch.randn(20_001, 40).to(dtype)

    def run():
        return soft_embedding(logits, embedding, mask_id=5, mix=0.8)

    results = on_every_capability(run) + on_thread_counts(run)
    for result in results:
        assert torch.equal(result, results[0])
    assert torch.equal(soft_embedding(logits[2:4], embedding, mask_id=5, mix=0.8), results[0][2:4])


def test_strides_and_empty():
    logits = torch.randn(6, 50, 120)[::2, 3:40]
    embedding = torch.randn(150, 64)[:, 7:40]
    dense = soft_embedding(logits.contiguous(), embedding.contiguous(), mask_id=140)
    assert torch.equal(soft_embedding(logits, embedding, mask_id=140), dense)
    expanded = torch.randn(1, 33).expand(150, 33)
    assert soft_embedding(logits, expanded, mask_id=140).isfinite().all()
    assert soft_embedding(torch.zeros(0, 9), embedding, mask_id=0).shape == (0, 33)
    assert soft_embedding(torch.zeros(3, 9), embedding[:, :0], mask_id=0).shape == (3, 0)
    assert soft_embedding(torch.zeros(2, 0), embedding, mask_id=0).isnan().all()
    assert soft_embedding(torch.zeros(9), embedding, mask_id=0).shape == (33,)


def test_no_graph_is_kept():
    embedding = torch.nn.Embedding(9, 4)
    result = soft_embedding(torch.randn(2, 9, requires_grad=True), embedding.weight, mask_id=8)
    assert not result.requires_grad


def test_opcheck_and_compile():
    logits, embedding = torch.randn(2, 3, 40), torch.randn(40, 8)
    op = torch.ops.winnow.soft_embedding.default
    mask = torch.rand(2, 3) < 0.5
    torch.library.opcheck(op, (logits, embedding, embedding[3], mask, 0.7, 5, 0.9, 0.2))
    torch.library.opcheck(op, (logits, embedding, embedding[3], None, 0.0, None, None, 1.0))
    compiled = torch.compile(soft_embedding, fullgraph=True)
    assert torch.equal(
        compiled(logits, embedding, mask_id=3), soft_embedding(logits, embedding, mask_id=3)
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"logits": 3}, "logits: expected a tensor, got 3"),
        ({"logits": torch.tensor(1.0)}, r"logits: expected \(\.\.\., V\), got a scalar"),
        ({"logits": torch.zeros(2, 5).long()}, "logits: expected float32.*got int64"),
        ({"logits": torch.zeros(2, 5).double()}, "embedding: expected float64 exactly where"),
        ({"logits": torch.zeros(2, 6)}, r"embedding: expected at least V=6 rows.*got \(5, 3\)"),
        ({"embedding": torch.zeros(5, 2, 3), "mask_embedding": torch.zeros(3), "mask_id": None},
         r"embedding: expected \(V, E\)"),
        ({"embedding": torch.zeros(5, 2, 3)}, r"embedding: expected \(V, E\), got \(5, 2, 3\)"),
        ({"mask_id": True}, "mask_id: expected an integer, got True"),
        ({"mask_id": None, "mask_embedding": [1.0]}, "mask_embedding: expected a tensor or None"),
        ({"mask": [True]}, r"mask: expected a tensor or None, got \[True\]"),
        ({"top_k": 2.5}, "top_k: expected an integer, got 2.5"),
        ({"embedding": torch.zeros(3, 5).T}, "embedding: the last dimension must be contiguous"),
        ({"mask_id": 5}, r"mask_id: expected one in \[0, 5\), got 5"),
        ({"mask_id": None}, "mask_id: expected either mask_id or mask_embedding, got neither"),
        ({"mask_embedding": torch.zeros(3)}, "mask_id: expected either.*got both"),
        ({"mask_embedding": torch.zeros(4), "mask_id": None}, r"mask_embedding: expected \(E,\)"),
        ({"mask_embedding": torch.zeros(3).half(), "mask_id": None},
         "mask_embedding: expected float32, got float16"),
        ({"mask": torch.ones(3, dtype=torch.bool)}, "mask: expected one for each row"),
        ({"mask": torch.ones(2)}, "mask: expected bool, got float32"),
        ({"temperature": -1.0}, "temperature: expected a finite number >= 0, got -1"),
        ({"top_k": 0}, "top_k: expected at least 1, got 0"),
        ({"top_p": 0.0}, r"top_p: expected a number in \(0, 1\], got 0"),
        ({"mix": 1.5}, r"mix: expected a number in \[0, 1\], got 1.5"),
        ({"mix": NAN}, r"mix: expected a number in \[0, 1\], got nan"),
    ],
)  # fmt: skip
def test_errors_name_the_argument(options, message):
    options = {
        "logits": torch.zeros(2, 5), "embedding": torch.zeros(5, 3), "mask_id": 4, **options
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        soft_embedding(**options)
