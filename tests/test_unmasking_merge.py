"""merge_logit_stats: parts of a vocabulary give what the whole gives, bit for bit."""

from __future__ import annotations

import math

import pytest
import torch
import torch.multiprocessing
from hypothesis import given, settings
from hypothesis import strategies as st

from torch_winnow import reference
from torch_winnow.unmasking import LogitStats, logit_stats, merge_logit_stats

INF = float("inf")
NAN = float("nan")


def in_parts(function, logits, cuts, **options):
    """Statistics of logits[..., a:b] between neighbouring cuts, last part first."""
    edges = [0, *sorted(cuts), logits.shape[-1]]
    rows = {
        name: options.pop(name)
        for name in ("previous_logits", "unconditional_logits")
        if name in options
    }
    return [
        function(
            logits[..., a:b],
            vocab_start=a,
            **{name: value[..., a:b] for name, value in rows.items()},
            **options,
        )
        for a, b in reversed(list(zip(edges, edges[1:], strict=False)))
    ]


def assert_equal(result: LogitStats, expected: LogitStats) -> None:
    for name, ours, theirs in zip(LogitStats._fields[:-1], result, expected, strict=False):
        if theirs is None:
            assert ours is None, name
            continue
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours.nan_to_num(nan=-7.0), theirs.nan_to_num(nan=-7.0)), name


@settings(max_examples=60, deadline=None)
@given(
    vocab=st.sampled_from([1, 5, 1023, 1024, 1025, 3000, 9001]),
    cuts=st.lists(st.integers(0, 9001), max_size=4),
    wide=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    special=st.sampled_from([None, -INF, INF, NAN, 3e4]),
    options=st.fixed_dictionaries(
        {},
        optional={
            "temperature": st.sampled_from([0.0, 0.3, 2.0, 1e60]),
            "seed": st.integers(-5, 5),
            "statistics": st.just("raw"),
            "suppress_ids": st.lists(st.integers(0, 0), max_size=1),
            "target": st.booleans(),
            "previous": st.booleans(),
            "guided": st.booleans(),
            "masked": st.booleans(),
        },
    ),
    seed=st.integers(0, 10**6),
)
def test_any_cut_gives_the_same_bits(vocab, cuts, wide, special, options, seed):
    generator = torch.Generator().manual_seed(seed)
    cuts = [min(cut, vocab) for cut in cuts]
    logits = 4 * torch.randn(5, vocab, generator=generator)
    if special is not None:
        logits[1, torch.randint(0, vocab, (), generator=generator)] = special
    logits[2] = -INF
    logits = logits.to(wide)
    other = (logits + torch.randn(5, vocab, generator=generator)).to(wide)
    if options.pop("target", False):
        options["target_ids"] = torch.randint(0, vocab, (5,), generator=generator)
    if options.pop("previous", False):
        options["previous_logits"] = other
    if options.pop("guided", False):
        options |= {"unconditional_logits": other, "cfg_scale": 0.5}
    if options.pop("masked", False):
        options["mask"] = torch.tensor([True, True, True, False, True])
    whole = logit_stats(logits, **options)
    merged = merge_logit_stats(in_parts(logit_stats, logits, cuts, **options))
    if wide == torch.float64:  # the target's logarithm is rounded once more
        torch.testing.assert_close(
            merged.target_log_prob, whole.target_log_prob, rtol=1e-12, atol=1e-12, equal_nan=True
        )
        merged = merged._replace(target_log_prob=whole.target_log_prob)
    assert_equal(merged, whole)


@pytest.mark.parametrize("world", [2, 4, 8])
def test_a_vocabulary_over_ranks(world, on_every_capability):
    """LLaDA's vocabulary: multiples of 64, none of 1024."""
    logits = 3 * torch.randn(3, 126_464)
    share = 126_464 // world
    options = {"seed": 5, "temperature": 0.8, "target_ids": torch.tensor([0, 70_000, 126_463])}
    cuts = [share * rank for rank in range(1, world)]

    def run():
        return merge_logit_stats(in_parts(logit_stats, logits, cuts, **options))

    whole = logit_stats(logits, **options)
    for merged in on_every_capability(run):
        assert_equal(merged, whole)
    part = in_parts(logit_stats, logits, cuts, **options)[0]
    assert part.parts[0].blocks.nbytes < 0.06 * logits.nbytes / world + 3 * 4 * 2048


def test_merged_parts_merge_again():
    logits = torch.randn(2, 5000)
    low, middle, high = reversed(in_parts(logit_stats, logits, [700, 3333], seed=1))
    twice = merge_logit_stats([merge_logit_stats([high, middle]), low])
    assert_equal(twice, logit_stats(logits, seed=1))
    assert [part.start for part in twice.parts] == [0, 700, 3333]


def test_a_part_describes_itself():
    logits = torch.randn(4, 3000)
    part = logit_stats(
        logits[:, 1000:2500],
        vocab_start=1000,
        target_ids=torch.tensor([1200, 999, 2500, 0]),
        suppress_ids=[3, 1100, 2999],
    )
    narrow = logits[:, 1000:2500].clone()
    narrow[:, 100] = -INF
    own = logit_stats(narrow, target_ids=torch.tensor([200, 0, 0, 0]))
    assert torch.equal(part.argmax, own.argmax + 1000)
    torch.testing.assert_close(part.entropy, own.entropy)
    torch.testing.assert_close(part.target_log_prob[0], own.target_log_prob[0])
    assert part.target_log_prob[1:].tolist() == [-INF] * 3


def test_matches_the_definition():
    logits = torch.randn(6, 2000, dtype=torch.float64)
    options = {"temperature": 0.7, "target_ids": torch.arange(6), "previous_logits": logits.flip(0)}
    ours = merge_logit_stats(in_parts(logit_stats, logits.float(), [300], **{
        **options, "previous_logits": logits.flip(0).float()}))  # fmt: skip
    definition = reference.merge_logit_stats(
        in_parts(reference.logit_stats, logits, [300], **options)
    )
    for name in ("entropy", "logsumexp", "margin", "target_log_prob", "kl"):
        torch.testing.assert_close(
            getattr(ours, name).double(), getattr(definition, name), rtol=1e-4, atol=1e-5
        )
    assert torch.equal(ours.argmax, definition.argmax)


def test_draws_from_parts_follow_the_whole():
    """Binomial counts per part, 5 standard deviations: an error rate under 1e-5."""
    row = torch.cat([torch.full((1500,), -8.0), torch.zeros(1), torch.full((1500,), -6.0)])
    rows = 4000
    logits = row.expand(rows, -1)
    token = merge_logit_stats(in_parts(logit_stats, logits, [1500, 1501], seed=3)).token
    share = row.double().softmax(-1)
    for begin, end in ((0, 1500), (1500, 1501), (1501, 3001)):
        p = float(share[begin:end].sum())
        count = int(((token >= begin) & (token < end)).sum())
        assert abs(count - rows * p) < 5 * math.sqrt(rows * p * (1 - p))


def _rank(rank: int, folder: str) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2
    )
    torch.manual_seed(0)
    torch.set_num_threads(1)
    logits = 3 * torch.randn(4, 2 * 494 * 128)
    begin, end = rank * 494 * 128, (rank + 1) * 494 * 128
    part = logit_stats(logits[:, begin:end], vocab_start=begin, seed=11)
    gathered: list[LogitStats | None] = [None, None]
    torch.distributed.all_gather_object(gathered, part)
    assert_equal(merge_logit_stats(gathered), logit_stats(logits, seed=11))
    torch.distributed.destroy_process_group()


def test_two_processes_get_what_one_gets(tmp_path):
    if not torch.distributed.is_available():
        pytest.skip("needs torch.distributed")
    torch.multiprocessing.spawn(_rank, (str(tmp_path),), nprocs=2)


def test_opcheck_and_compile():
    logits = torch.randn(3, 2500)
    parts = in_parts(logit_stats, logits, [900], seed=2, previous_logits=logits)
    pieces = [part.parts[0] for part in reversed(parts)]
    torch.library.opcheck(
        torch.ops.winnow.merge_logit_stats.default,
        ([piece.blocks for piece in pieces], [0, 900], [900, 1600], 1.0, torch.tensor(2), False,
         False, True),
    )  # fmt: skip

    def both(logits):
        return merge_logit_stats(in_parts(logit_stats, logits, [900], seed=2)).token

    assert torch.equal(torch.compile(both, fullgraph=True)(logits), both(logits))


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([], "parts: expected at least one"),
        ([logit_stats(torch.zeros(2, 3))], "parts: expected LogitStats from.*without vocab_start"),
        ([3], "parts: expected LogitStats from.*got 3"),
        ([logit_stats(torch.zeros(2, 3), vocab_start=0),
          logit_stats(torch.zeros(2, 3), vocab_start=4)], "adjoining.*ends at 3.*starts at 4"),
        ([logit_stats(torch.zeros(2, 3), vocab_start=0),
          logit_stats(torch.zeros(2, 3), vocab_start=2)], "adjoining"),
        ([logit_stats(torch.zeros(2, 3), vocab_start=0),
          logit_stats(torch.zeros(1, 3), vocab_start=3)], "same rows"),
        ([logit_stats(torch.zeros(2, 3), vocab_start=0, temperature=2.0),
          logit_stats(torch.zeros(2, 3), vocab_start=3)], "same temperature in all of them"),
        ([logit_stats(torch.zeros(2, 3), vocab_start=0, seed=1),
          logit_stats(torch.zeros(2, 3), vocab_start=3)], "same seed"),
    ],
)  # fmt: skip
def test_errors_name_what_is_wrong(parts, message):
    with pytest.raises(ValueError, match=message):
        merge_logit_stats(parts)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 3}, "top_k: expected None with vocab_start, because"),
        ({"top_p": 0.5}, "top_p: expected None with vocab_start, because"),
        ({"min_p": 0.5}, "min_p: expected None with vocab_start, because"),
        ({"vocab_start": -1}, r"vocab_start: expected 0 to 2\^62, got -1"),
        ({"vocab_start": 1.5}, "vocab_start: expected an integer, got 1.5"),
        ({"target_ids": torch.tensor([-1, 0])}, "target_ids: expected ids of at least 0"),
        ({"suppress_ids": [-1]}, "suppress_ids: expected ids of at least 0, got -1"),
    ],
)
def test_what_a_part_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        logit_stats(torch.zeros(2, 3), **{"vocab_start": 0, **options})


def test_parts_that_do_not_belong_together_are_refused():
    low, high = torch.randn(2, 3, 20).unbind()
    parts = [logit_stats(low, vocab_start=0, seed=1), logit_stats(high, vocab_start=20, seed=2)]
    with pytest.raises(ValueError, match="expected the same seed in all of them, got 1 and 2"):
        merge_logit_stats(parts)
    for wrong in (3, parts[0]):
        with pytest.raises(ValueError, match="parts: expected a sequence of LogitStats, got"):
            merge_logit_stats(wrong)
    with pytest.raises(ValueError, match=r"vocab_start: expected ids below 2\^63"):
        logit_stats(low, vocab_start=2**63 - 1)


def test_a_seed_that_the_parts_did_not_have_draws_nothing(device):
    """A part may be anybody's numbers: without a drawn token its rows are as if left out."""
    blocks = logit_stats(torch.randn(2, 2048).to(device), vocab_start=0).parts[0].blocks
    token, *statistics = torch.ops.winnow.merge_logit_stats(
        [blocks], [0], [2048], 1.0, torch.tensor(5, device=device), False, False, False
    )
    assert token.tolist() == [-1, -1]
    assert all(not statistic.any() for statistic in statistics)
