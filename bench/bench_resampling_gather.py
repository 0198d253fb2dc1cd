"""gather_particles_ after keep_slots against index_select, with and without memory of its own.

256 MB of state, as latents or caches have it. ``index_select`` gets the ancestors that a rival's
resampling gives (ascending), and as ``out`` a buffer that is there already, which is the best that
two alternating buffers can do.
"""

from __future__ import annotations

import pytest
import torch

from torch_winnow import reference
from torch_winnow.resampling import gather_particles, gather_particles_, resample

SHAPES = [(8, 8 * 2**20), (64, 2**20), (4096, 2**14), (2**20, 64)]
IMPLS = ("winnow", "winnow out of place", "index_select", "index_select out")


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gather(measure, shape, impl):
    state = torch.randn(shape)
    log_weights = torch.randn(shape[0])
    kept = resample(log_weights, seed=1, keep_slots=True).ancestors
    ascending = resample(log_weights, seed=1).ancestors
    sample = state[:, :16].clone()
    expected = reference.gather_particles(sample, kept)
    assert torch.equal(gather_particles(sample, kept), expected)
    assert torch.equal(gather_particles_(sample, kept), expected)

    buffer = torch.empty_like(state) if impl == "index_select out" else None
    functions = {
        "winnow": lambda: gather_particles_(state, kept),
        "winnow out of place": lambda: gather_particles(state, ascending),
        "index_select": lambda: state.index_select(0, ascending),
        "index_select out": lambda: torch.index_select(state, 0, ascending, out=buffer),
    }
    moved = int((kept != torch.arange(shape[0])).sum()) * shape[1] * 4
    measure(
        f"gather_particles {shape[0]} rows of {shape[1] * 4} bytes",
        impl,
        functions[impl],
        moved_bytes=2 * moved,
        rounds=7,
    )
