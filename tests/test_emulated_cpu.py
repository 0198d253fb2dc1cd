"""Processors without the runner's instructions, emulated: nothing that they lack is executed, the
operators are right there, and what is promised bit for bit is the same as here."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest

QEMU = shutil.which("qemu-x86_64")
PROGRAM = """
import hashlib, torch
from torch_winnow import build_info, __main__ as self_check
from torch_winnow.resampling import resample
from torch_winnow.unmasking import EntropyThreshold, logit_stats, select_positions

draw = torch.Generator().manual_seed(0)
weights, logits = torch.randn(7, 100, generator=draw), torch.randn(1, 9, 3000, generator=draw) * 3
scores, mask = torch.rand(4, 65, generator=draw), torch.rand(4, 65, generator=draw) < 0.7
results = [resample(weights, scheme=s, seed=1).ancestors for s in ("systematic", "ssp", "residual")]
results.append(logit_stats(logits, temperature=0.7, seed=2).token)
results.append(select_positions(scores, mask, EntropyThreshold(0.2))[0])
print("wrong", self_check.main())
print("runs", build_info().cpu_capability)
print("bits", hashlib.sha256(b"".join(r.numpy().tobytes() for r in results)).hexdigest())
"""


def answers(*emulator: str) -> dict[str, str]:
    result = subprocess.run(
        [*emulator, sys.executable, "-c", PROGRAM],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    lines = (line.split() for line in result.stdout.splitlines())
    return {
        words[0]: words[1] for words in lines if words and words[0] in ("wrong", "runs", "bits")
    }


@pytest.fixture(scope="module")
def here() -> dict[str, str]:
    return answers()


@pytest.mark.skipif(QEMU is None, reason="qemu-user is not installed")
@pytest.mark.parametrize(("cpu", "capability"), [("Nehalem", "default"), ("Haswell", "avx2")])
def test_emulated(cpu: str, capability: str, here: dict[str, str]) -> None:
    there = answers(str(QEMU), "-cpu", cpu)
    assert there == {"wrong": "0", "runs": capability, "bits": here["bits"]}
