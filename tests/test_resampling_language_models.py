"""The page on constrained generation, run many times: its estimates are right in expectation."""

from __future__ import annotations

import doctest
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", minversion="5")

PAGE = Path(__file__).parents[1] / "docs/recipes/language_models.md"


@pytest.fixture(scope="module")
def page():
    """What the page defines: the model, ``steer``, and the exact posterior."""
    names: dict = {}
    for example in doctest.DocTestParser().get_examples(PAGE.read_text(encoding="utf-8")):
        if not example.want:  # definitions; what is printed, test_documentation checks
            exec(compile(example.source, str(PAGE), "exec"), names)
    return names


def test_log_z_and_marginals_are_unbiased(page):
    """Every estimate within 4.5 standard errors of 80 runs: 25 of them err once in 6000 seeds."""
    runs = []
    for seed in range(80):
        tokens, steering = page["steer"](seed, 48)
        z = (steering.log_z - page["log_z"]).exp()
        hits = torch.nn.functional.one_hot(tokens, 4).float()
        # Z times an expectation is what particles estimate without bias.
        marginals = z * torch.einsum("k,ktv->tv", steering.weights, hits)
        runs.append(torch.cat([z[None], marginals.flatten()]))
    runs = torch.stack(runs)
    exact = torch.cat([torch.ones(1), page["marginals"].flatten()])
    error = runs.std(0) / len(runs) ** 0.5
    assert error[0] < 0.03  # a weight forgotten at one step would show
    assert ((runs.mean(0) - exact).abs() <= 4.5 * error + 1e-6).all()


def test_particles_satisfy_the_constraint(page):
    tokens, _ = page["steer"](3, 200)
    depth = 1 + ((tokens == 0).long() - (tokens == 1).long()).cumsum(1)
    assert (depth >= 0).all()
    assert (depth[:, -1] == 0).all()
    assert not ((tokens[:, 1:] == 2) & (tokens[:, :-1] == 2)).any()


def test_the_cache_does_not_change_the_particles(page, monkeypatch):
    from transformers import DynamicCache

    tokens, steering = page["steer"](0, 64)
    monkeypatch.setitem(page, "WinnowCache", lambda config, **_: DynamicCache(config=config))
    monkeypatch.setattr(page["model"].config, "_attn_implementation_internal", "sdpa")
    again, other = page["steer"](0, 64)
    assert torch.equal(tokens, again)
    torch.testing.assert_close(steering.log_z, other.log_z)


def test_particles_share_their_blocks(page, monkeypatch):
    """After every resample the blocks in use are those of distinct histories, not of particles."""
    cache_type, caches = page["WinnowCache"], []

    def keep(*args, **kwargs):
        caches.append(cache_type(*args, **kwargs))
        return caches[-1]

    monkeypatch.setitem(page, "WinnowCache", keep)
    page["steer"](0, 256)
    pages = caches[0].pages
    used = pages.pool.num_blocks - pages.pool.num_free_blocks
    assert pages.seq_lens.tolist() == [9] * 256
    assert used < 256 * 3
    assert used == len(set(pages.block_table.flatten().tolist()) - {-1})
