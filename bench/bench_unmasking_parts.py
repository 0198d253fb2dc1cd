"""logit_stats of a vocabulary in parts, and of logits that are never written down."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from torch_winnow.unmasking import LogitStats, linear_logit_stats, logit_stats, merge_logit_stats

ROWS, WIDTH, VOCAB = 64, 1024, 126_464  # LLaDA's vocabulary, a quarter of its hidden size


def halves(logits: Tensor) -> LogitStats:
    """What two ranks do, one after the other."""
    half = VOCAB // 2
    low = logit_stats(logits[:, :half], vocab_start=0, seed=1)
    high = logit_stats(logits[:, half:], vocab_start=half, seed=1)
    return merge_logit_stats([low, high])


@pytest.mark.parametrize("impl", ["winnow, two parts", "winnow, whole", "amax"])
def test_parts(measure, impl):
    logits = 2 * torch.randn(ROWS, VOCAB)
    functions = {
        "winnow, two parts": halves,
        "winnow, whole": lambda logits: logit_stats(logits, seed=1),
        "amax": lambda logits: logits.amax(-1),
    }
    if impl == "winnow, two parts":
        assert torch.equal(halves(logits).token, logit_stats(logits, seed=1).token)
    measure(
        f"logit_stats of parts {ROWS}x{VOCAB} float32",
        impl,
        functions[impl],
        inputs=[(logits,)],
        moved_bytes=logits.nbytes,
        rounds=9,
    )


@pytest.mark.parametrize("rows", [4, ROWS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("impl", ["winnow", "matmul + logit_stats", "matmul + softmax"])
def test_linear(measure, impl, dtype, rows):
    hidden = torch.randn(rows, WIDTH).to(dtype)
    weight = (torch.randn(VOCAB, WIDTH) / 16).to(dtype)

    def softmax(hidden: Tensor, weight: Tensor) -> Tensor:
        p = (hidden @ weight.T).float().softmax(-1)
        return torch.special.entr(p).sum(-1)

    functions = {
        "winnow": lambda hidden, weight: linear_logit_stats(hidden, weight).entropy,
        "matmul + logit_stats": lambda hidden, weight: logit_stats(hidden @ weight.T).entropy,
        "matmul + softmax": softmax,
    }
    if impl == "winnow":
        torch.testing.assert_close(
            functions[impl](hidden, weight), softmax(hidden, weight), rtol=0.02, atol=0.02
        )
    measure(
        f"linear_logit_stats {rows}x{WIDTH} to {VOCAB} {str(dtype)[6:]}",
        impl,
        functions[impl],
        inputs=[(hidden, weight)],
        moved_bytes=weight.nbytes,
        rounds=5,
    )
