"""A build with sanitizers finds what it is made to find: bugs compiled as the operators are."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import torch_winnow

PACKAGE = Path(torch_winnow.__file__).parent
CALL = """
import ctypes, sys, torch
numbers = torch.zeros(8, dtype=torch.int64)
bugs = ctypes.CDLL(sys.argv[1])
where = ctypes.c_void_p(numbers.data_ptr())
print(eval(sys.argv[2]))
"""


def call(sanitizer: str, expression: str) -> subprocess.CompletedProcess[str]:
    library = PACKAGE / f"bugs_for_{sanitizer}.so"
    if not library.exists():
        pytest.skip(f"needs a build with WINNOW_SANITIZE={sanitizer}")
    command = [sys.executable, "-c", CALL, str(library), expression]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("sanitizer", "expression", "report"),
    [
        ("address", "bugs.read_behind(where, ctypes.c_int64(8))", "heap-buffer-overflow"),
        ("address", "bugs.successor(ctypes.c_int64(2**63 - 1))", "signed integer overflow"),
        ("thread", "bugs.race()", "data race"),
    ],
)
def test_a_planted_bug_is_found(sanitizer: str, expression: str, report: str):
    done = call(sanitizer, expression)
    assert done.returncode != 0
    assert report in done.stderr


@pytest.mark.parametrize("sanitizer", ["address", "thread"])
def test_nothing_is_found_in_a_loop_over_threads(sanitizer: str):
    done = call(sanitizer, "bugs.no_race()")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{sum(range(64))}\n", "")
