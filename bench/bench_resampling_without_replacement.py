"""sample_without_replacement against compositions of torch operators.

The rival of Gumbel top-k includes its inclusion probabilities and weights. Conditional Poisson
sampling has the log-space recursion of Meister et al. (2021) as a rival, vectorised over counts.
"""

from __future__ import annotations

import pytest
import torch

from torch_winnow import reference
from torch_winnow.resampling import inclusion_probabilities, sample_without_replacement


def torch_gumbel_topk(log_weights: torch.Tensor, k: int):
    log_shares = log_weights.log_softmax(-1)
    perturbed = log_shares - torch.empty_like(log_shares).exponential_().log_()
    values, indices = perturbed.topk(k + 1)
    chosen = log_shares.gather(-1, indices[..., :k])
    inclusion = -torch.expm1(-torch.exp(chosen - values[..., k:]))
    return indices[..., :k], inclusion, chosen.exp() / inclusion


def torch_conditional_poisson(log_weights: torch.Tensor, k: int):
    x = log_weights.double()
    n = x.shape[-1]
    tails = x.new_full((n + 1, x.shape[0], k + 1), -torch.inf)
    tails[n, :, 0] = 0.0
    for i in reversed(range(n)):
        tails[i] = tails[i + 1]
        tails[i, :, 1:] = torch.logaddexp(tails[i, :, 1:], tails[i + 1, :, :-1] + x[:, i, None])
    missing = torch.full((x.shape[0], 1), k)
    taken = []
    for i in range(n):
        log_p = x[:, i, None] + tails[i + 1].gather(1, (missing - 1).clamp(min=0))
        p = (log_p - tails[i].gather(1, missing)).exp()
        take = (torch.rand_like(p) < p) & (missing > 0)
        missing = missing - take.long()
        taken.append(take)
    return torch.cat(taken, 1)


IMPLS = {
    ("gumbel_topk", "winnow"): lambda x, k: sample_without_replacement(x, k, design="gumbel_topk"),
    ("gumbel_topk", "torch"): torch_gumbel_topk,
    ("pareto", "winnow"): lambda x, k: sample_without_replacement(x, k, design="pareto"),
    ("conditional_poisson", "winnow"): sample_without_replacement,
    ("conditional_poisson", "torch"): torch_conditional_poisson,
}


@pytest.mark.parametrize(("design", "impl"), IMPLS, ids=str)
@pytest.mark.parametrize(
    ("shape", "k"), [((1, 1000), 100), ((256, 1000), 16), ((1, 100_000), 1000)], ids=str
)
def test_sample_without_replacement(measure, shape, k, design, impl):
    if design == "conditional_poisson" and impl == "torch" and shape[0] * shape[1] > 1000:
        pytest.skip("torch: seconds a call, and gigabytes for its table")
    few = torch.randn(2, 30)
    torch.testing.assert_close(
        inclusion_probabilities(few, 7), reference.inclusion_probabilities(few, 7)
    )
    measure(
        f"{design} {shape[0]}x{shape[1]} k={k} float32",
        impl,
        IMPLS[design, impl],
        inputs=[(2 * torch.randn(shape), k) for _ in range(3)],
        moved_bytes=4 * shape[0] * shape[1],
        rounds=5,
    )
