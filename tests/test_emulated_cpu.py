"""Processors without the runner's instructions, emulated: nothing that they lack is executed, the
operators are right there, what is promised bit for bit is the same as here, the rest within the
tolerance of its dtype."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import TOLERANCE

QEMU = shutil.which("qemu-x86_64")
PROGRAM = """
import sys, torch
from torch_winnow import build_info, __main__ as self_check
from torch_winnow.attention import cat_attention
from torch_winnow.kvcache import paged_attention
from torch_winnow.resampling import effective_sample_size, gather_particles, resample
from torch_winnow.unmasking import EntropyThreshold, logit_stats, select_positions

draw = torch.Generator().manual_seed(0)


def numbers(*shape):  # torch's own normal numbers differ between instruction sets
    return torch.randint(-400, 401, shape, generator=draw) / 100


weights, logits, particles = numbers(7, 100), numbers(1, 9, 3000), numbers(7, 100, 3)
scores, mask = torch.rand(4, 65, generator=draw), torch.rand(4, 65, generator=draw) < 0.7
(query, key, value), pages = numbers(3, 1, 2, 50, 40), numbers(2, 4, 2, 16, 40)
blocks, lengths = torch.tensor([[2, 0, 3, 1]]).int(), torch.tensor([50]).int()

# What docs/numerics.md promises to be the same on every instruction set, and what it does not.
schemes = ("systematic", "ssp", "residual")
ancestors = [resample(weights, scheme=scheme, seed=1).ancestors for scheme in schemes]
stats = logit_stats(logits, temperature=0.7, seed=2)
bits = [*ancestors, gather_particles(particles, ancestors[0]), stats.token]
bits.append(select_positions(scores, mask, EntropyThreshold(0.2))[0])
values = [effective_sample_size(weights), stats.entropy, stats.logsumexp]
for dtype in (torch.float32, torch.bfloat16, torch.float64):
    q, k, v, p = (x.to(dtype) for x in (query, key, value, pages))
    values.append(cat_attention(q, k, v, block_size=9))
    values.append(paged_attention(q[:, :, :3], *p, blocks, lengths))
wrong, runs = self_check.main(), build_info().cpu_capability
torch.save({"bits": bits, "values": values, "wrong": wrong, "runs": runs}, sys.argv[1])
"""


def answers(file: Path, *emulator: str) -> dict[str, Any]:
    result = subprocess.run(
        [*emulator, sys.executable, "-c", PROGRAM, file],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return torch.load(file)


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return answers(tmp_path_factory.mktemp("here") / "answers.pt")


@pytest.mark.skipif(QEMU is None, reason="qemu-user is not installed")
@pytest.mark.parametrize(("cpu", "capability"), [("Nehalem", "default"), ("Haswell", "avx2")])
def test_emulated(cpu: str, capability: str, here: dict[str, Any], tmp_path: Path) -> None:
    there = answers(tmp_path / "answers.pt", str(QEMU), "-cpu", cpu)
    assert (there["wrong"], there["runs"]) == (0, capability)
    assert all(map(torch.equal, there["bits"], here["bits"]))
    for value, expected in zip(there["values"], here["values"], strict=True):
        torch.testing.assert_close(value, expected, **TOLERANCE[value.dtype])
