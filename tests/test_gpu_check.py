"""What `make gpu-check` runs and how it reports; the steps themselves need no GPU."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "bench" / "gpu_check.py"
pytestmark = pytest.mark.skipif(not SCRIPT.exists(), reason="needs the source checkout")


@pytest.fixture(scope="module")
def gpu_check():
    spec = importlib.util.spec_from_file_location("gpu_check", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_check"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


MACHINE = {"gpu": "A GPU", "torch": "2.11", "cuda": "13.0"}


def step(gpu_check, code, limit=60.0):
    return gpu_check.Step("tests", [sys.executable, "-c", code], limit)


@pytest.mark.parametrize(
    ("code", "limit", "status"),
    [
        ("print('fine')", 60, "ok"),
        ("print('3 failed'); raise SystemExit(1)", 60, "failed (1)"),
        ("import time; print('slow', flush=True); time.sleep(60)", 5, "stopped after 5 s"),
        ("", 4, "skipped: no time left"),
    ],
    ids=lambda value: str(value) if isinstance(value, str) else "",
)
def test_a_step_reports_what_became_of_it(gpu_check, tmp_path, code, limit, status):
    ran = step(gpu_check, code)
    ran.run(tmp_path, limit)
    assert ran.status == status
    row = next(x for x in gpu_check.summary(tmp_path, MACHINE, [ran]).split("\n") if "| tests" in x)
    assert status in row
    assert (re.findall("fine|3 failed|slow", code) or [""])[0] in row


def test_a_program_that_is_missing_fails(gpu_check, tmp_path):
    ran = gpu_check.Step("build", ["/nowhere/compiler"], 60)
    ran.run(tmp_path, 60)
    assert ran.status.startswith("failed")


def test_the_benchmarks_become_a_table(gpu_check):
    case = {
        "name": "op 1x2",
        "moved": 1e9,
        "operations": 0,
        "seconds": {"winnow": 1e-3, "sdpa": 2e-3},
    }
    lost = {"name": "op 3x4", "moved": 1e9, "seconds": {"sdpa": 1.0}, "errors": {"winnow": "Oops"}}
    limits = {"copy_bytes_per_s": 2e12, "matmul_per_s": 1e15}
    rows = gpu_check.table({"limits": limits, "cases": [case, lost]})
    assert rows[2] == "| op 1x2 | 1.000 ms | 50% | sdpa 2.00× |"
    assert rows[3] == "| op 3x4 | – | – | sdpa, winnow: Oops |"


def test_its_tests_are_collected_without_optional_packages(gpu_check):
    """A bare GPU machine has torch, pytest and the build tools, and no hypothesis or the like."""
    absent = ["hypothesis", "scipy", "transformers", "diffusers", "tabulate", "matplotlib", "tqdm"]
    code = (
        f"import sys, pytest; sys.modules.update(dict.fromkeys({absent}))\n"
        f"sys.exit(pytest.main(['--collect-only', '-q', *{gpu_check.cuda_tests()!r}]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},  # hypothesis has one
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    for family in ("attention", "kvcache_attention", "resampling_resample", "unmasking_stats"):
        assert f"tests/test_{family}.py::test_" in done.stdout


def test_every_family_is_sanitized(gpu_check):
    wanted = [word.strip() for word in gpu_check.SANITIZED.split(" or ")]
    for path in (ROOT / "tests" / "native").glob("test_cuda_*.py"):
        names = re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE)
        if path.stem == "test_cuda_graphs":  # under a sanitizer a graph's kernels are seen too late
            continue
        assert any(word in name for name in names for word in wanted), path.name
