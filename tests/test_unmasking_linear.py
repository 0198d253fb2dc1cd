"""linear_logit_stats: what logit_stats makes of the same logits, without them."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from torch_winnow import reference
from torch_winnow._unmasking import linear
from torch_winnow.unmasking import linear_logit_stats, logit_stats

NAMES = ("log_prob", "max_prob", "margin", "entropy", "logsumexp", "target_log_prob")


def integers(shape, dtype=torch.float32):
    """Small integers: every matrix product is exact, whatever the order of its sums."""
    return torch.randint(-2, 3, shape).to(dtype)


@pytest.mark.parametrize("vocab", [1, 700, 1024, 2500, 5000])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"seed": 3, "temperature": 0.7, "mask": True},
        {"statistics": "raw", "temperature": 0.5, "seed": 1, "shift": True},
        {"target_ids": True, "suppress_ids": [0], "mask": True, "shift": True},
        {"temperature": 0.0, "bias": True},
    ],
    ids=lambda options: "+".join(options) or "plain",
)
def test_is_logit_stats_of_the_logits(vocab, options, dtype):
    hidden, weight = integers((3, 5, 8), dtype), integers((vocab, 8), dtype)
    options = dict(options)
    bias = integers((vocab,), dtype) if options.pop("bias", False) else None
    if "mask" in options:
        options["mask"] = torch.rand(3, 5) < 0.6
    if "target_ids" in options:
        options["target_ids"] = torch.randint(0, vocab, (3, 5))
    ours = linear_logit_stats(hidden, weight, bias, **options)
    logits = torch.nn.functional.linear(hidden, weight, bias)
    expected = logit_stats(logits, **options)
    for left, right in zip(ours[:-1], expected[:-1], strict=True):
        assert (left is None) == (right is None)
        if left is not None:
            assert torch.equal(left.nan_to_num(7.0), right.nan_to_num(7.0))


def test_matches_the_definition(dtype):
    hidden, weight = torch.randn(20, 64).to(dtype), torch.randn(3000, 64).to(dtype) / 4
    bias = torch.randn(3000).to(dtype)
    target = torch.arange(20)
    ours = linear_logit_stats(hidden, weight, bias, target_ids=target)
    expected = reference.linear_logit_stats(
        hidden.double(), weight.double(), bias.double(), target_ids=target
    )
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.01}[dtype]
    for name in NAMES:
        torch.testing.assert_close(
            getattr(ours, name).double(), getattr(expected, name), rtol=tolerance, atol=tolerance
        )


class Largest(TorchDispatchMode):
    """What is held of tensors made inside, at most, in bytes; views count once."""

    def __init__(self, *given):
        super().__init__()
        self.live = {tensor.untyped_storage()._cdata: 0 for tensor in given}
        self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if not isinstance(tensor, torch.Tensor):
                continue
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key in self.live:
                continue
            self.live[key] = storage.nbytes()
            weakref.finalize(storage, self.live.pop, key, None)
            self.peak = max(self.peak, sum(self.live.values()))
        return result


@pytest.mark.parametrize("share", [None, 0.5])
def test_never_holds_the_logits(share):
    hidden, weight = torch.randn(64, 256), torch.randn(60_000, 256)
    mask = None if share is None else torch.rand(64) < share
    rows = 64 if mask is None else int(mask.sum())
    arguments = (hidden, weight, None, mask, 1.0, None, None, torch.tensor(1), False, False)
    with Largest(hidden, weight) as held:  # inside of the operator, which the mode would see as one
        linear._tiled(*arguments)
    assert 0 < held.peak < 0.05 * rows * 60_000 * 4


def test_opcheck_and_compile():
    hidden, weight = integers((2, 3, 8)), integers((2100, 8))
    mask = torch.tensor([[True, False, True], [True, True, True]])
    ids = torch.zeros(2, 3, dtype=torch.int64)
    torch.library.opcheck(
        torch.ops.winnow.linear_logit_stats.default,
        (hidden, weight, integers((2100,)), mask, 0.8, torch.tensor([1]), ids, torch.tensor(3),
         False, True),
    )  # fmt: skip
    compiled = torch.compile(linear_logit_stats, fullgraph=True)
    ours = compiled(hidden, weight, mask=mask, seed=1)
    assert torch.equal(ours.token, linear_logit_stats(hidden, weight, mask=mask, seed=1).token)


def test_nothing_to_measure():
    weight = torch.randn(50, 4)
    assert linear_logit_stats(torch.randn(0, 4), weight).token.shape == (0,)
    skipped = linear_logit_stats(torch.randn(2, 4), weight, mask=torch.zeros(2, dtype=torch.bool))
    assert skipped.token.tolist() == [-1, -1]
    assert skipped.entropy.tolist() == [0, 0]
    assert linear_logit_stats(torch.randn(2, 4), weight[:0]).token.tolist() == [-1, -1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"hidden": torch.randn(2, 4).double()}, "hidden: expected float32, bfloat16 or float16"),
        ({"weight": torch.randn(5, 3)}, r"weight: expected \(V, 4\).*got \(5, 3\)"),
        ({"weight": torch.randn(5, 4).half()}, "weight: expected.*float32 as in hidden.*float16"),
        ({"bias": torch.randn(4)}, r"bias: expected \(5,\).*got \(4,\)"),
        ({"mask": torch.ones(3, dtype=torch.bool)}, r"mask: expected \(2,\)"),
        ({"target_ids": torch.tensor([0, 5])}, r"target_ids: expected ids in \[0, 5\)"),
        ({"suppress_ids": [5]}, r"suppress_ids: expected ids in \[0, 5\), got 5"),
        ({"top_k": 3}, "top_k: expected None, because"),
        ({"top_p": 0.5}, "top_p: expected None, because"),
        ({"min_p": 0.5}, "min_p: expected None, because"),
        ({"previous_logits": torch.zeros(2, 5)}, "previous_logits: needs the logits themselves"),
        ({"cfg_scale": 1.0}, "cfg_scale: needs the logits themselves"),
        ({"shift": True, "hidden": torch.randn(4)}, r"hidden: expected \(\.\.\., L, E\) with"),
        ({"hidden": None}, "hidden: expected a tensor, got None"),
    ],
)
def test_errors_name_the_argument(arguments, message):
    call = {"hidden": torch.randn(2, 4), "weight": torch.randn(5, 4), **arguments}
    with pytest.raises(ValueError, match=message):
        linear_logit_stats(call.pop("hidden"), call.pop("weight"), **call)
