"""The bookkeeping of pools under sanitizers: a million operations against a model, and threads."""

from __future__ import annotations

import subprocess
from pathlib import Path

import host_library
import pytest

ROOT = Path(__file__).parents[2]
SOURCES = [
    *(Path(__file__).with_name(f"kvcache_{name}.cpp") for name in ("stress", "world", "refusals")),
    *sorted((ROOT / "csrc/kvcache").glob("cache_table*.cpp")),
    *(ROOT / "csrc/kvcache" / f"{name}.cpp" for name in ("block_pool", "prefix_index")),
]


def run(folder: Path, sanitizers: str, optimise: str, *arguments: str) -> str:
    """Compiles the program with these sanitizers, runs it, and returns what it prints."""
    compiler = host_library.tool("g++") or host_library.tool("clang++")
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    flags = [optimise, "-std=c++20", "-pthread", f"-I{ROOT / 'csrc'}"]
    flags += [f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all"]
    binary, probe = str(folder / "stress"), folder / "probe.cpp"
    probe.write_text("int main() { return 0; }\n")

    def command(*line: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(line, capture_output=True, text=True)

    probed = command(compiler, *flags, str(probe), "-o", binary)
    if probed.returncode or command(binary).returncode:
        pytest.skip(f"needs a compiler with -fsanitize={sanitizers}")
    built = command(compiler, *flags, *map(str, SOURCES), "-o", binary)
    assert built.returncode == 0, built.stderr
    done = command(binary, *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_million_operations_lose_no_block(tmp_path: Path):
    """Every effect and refusal as the model says; failing allocations change and leak nothing."""
    out = run(tmp_path, "address,undefined", "-O1", "fuzz", "1000000", "1")
    assert out == "fuzz: 1000000 operations\n"


def test_threads_with_caches_of_their_own(tmp_path: Path):
    out = run(tmp_path, "thread", "-O0", "threads", "30000", "1")
    assert out == "threads: 30000 operations\n"
