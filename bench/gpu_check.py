"""Everything that a GPU machine can say about this checkout, in one command without a network.

    make gpu-check OUT=folder          or: python bench/gpu_check.py folder

Builds from source against the torch that is there, runs the tests on CUDA, the benchmarks, and a
small subset of the tests under compute-sanitizer. The folder receives a log per step,
``bench.json`` and ``summary.md``, a short table that is also printed last. Ends within ten minutes:
a step that takes too long is stopped and reported. On a machine without a GPU the same steps run
with the kernels executed on the host and with small shapes: a rehearsal, which measures nothing.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import date
from pathlib import Path

ROOT = Path(__file__).parents[1]
BUDGET_S = 570.0

# Every family's kernels, small; -k of pytest.
SANITIZED = (
    "order or every_option_at_once or draws_are_those or key_bias or writes or block_copies"
    " or selected_blocks or traces or uniforms or compacts or never_counts or followed"
)
DESCRIBE = """
import json, torch
cuda = torch.cuda.is_available()
print(json.dumps({
    "torch": torch.__version__,
    "cuda": torch.version.cuda,
    "gpu": torch.cuda.get_device_name() if cuda else None,
    "capability": torch.cuda.get_device_capability() if cuda else None,
}))
"""


@dataclass
class Step:
    name: str
    command: list[str]
    limit_s: float
    cwd: Path = ROOT
    status: str = ""
    seconds: float = 0.0

    def run(self, out: Path, left_s: float) -> None:
        start = time.monotonic()
        limit = min(self.limit_s, left_s)
        if limit < 5:
            self.status = "skipped: no time left"
            return
        with (out / f"{self.name}.log").open("w") as log:
            try:
                process = subprocess.Popen(
                    self.command,
                    cwd=self.cwd,
                    # A container's own Python may be marked as externally managed.
                    env={**os.environ, "PIP_BREAK_SYSTEM_PACKAGES": "1"},
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
                code = process.wait(limit)
                self.status = "ok" if code == 0 else f"failed ({code})"
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)  # with the compilers that it started
                process.wait()
                self.status = f"stopped after {limit:.0f} s"
            except OSError as error:
                self.status = f"failed ({error})"
        self.seconds = time.monotonic() - start

    def last_line(self, out: Path) -> str:
        log = out / f"{self.name}.log"
        lines = log.read_text(errors="replace").split("\n") if log.exists() else []
        return next((line.strip() for line in reversed(lines) if line.strip()), "")


def sanitizer() -> str | None:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which("compute-sanitizer", path=f"{os.environ['PATH']}:{home}/bin")


def cuda_tests() -> list[str]:
    """Those of the GPU alone, and the files with tests for every device. Other files may import
    what a bare machine lacks."""
    shared = [
        str(path.relative_to(ROOT))
        for path in sorted((ROOT / "tests").glob("test_*.py"))
        if re.search(r"def test_\w+\([^)]*\bdevice\b", path.read_text())
    ]
    return ["tests/native", "tests/test_cuda_build.py", *shared, "-k", "cuda or emulator or gpu"]


def steps(out: Path, gpu: bool) -> list[Step]:
    python = sys.executable
    install = [python, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "--no-index"]
    install += ["-C", f"cmake.define.WINNOW_CUDA={'ON' if gpu else 'AUTO'}", "--editable", "."]
    pytest = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    listed = [
        Step("build", install, 240),
        Step("tests", [*pytest, *cuda_tests()], 200 if gpu else BUDGET_S),
        Step("bench", [python, "gpu_bench.py", str(out / "bench.json")], 240, ROOT / "bench"),
    ]
    if gpu and (tool := sanitizer()):
        for check in ("memcheck", "synccheck", "racecheck"):
            command = [tool, "--tool", check, "--error-exitcode", "9", *pytest, "tests/native"]
            listed.append(Step(check, [*command, "-k", SANITIZED], 60))
    return listed


def human(seconds: float) -> str:
    return f"{seconds * 1e3:.3f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.1f} µs"


def table(report: dict) -> list[str]:
    copy = report["limits"]["copy_bytes_per_s"]
    matmul = report["limits"]["matmul_per_s"]
    lines = [
        "| op and shape | winnow | of copy bandwidth, of matmul rate | rivals, time over ours |"
    ]
    lines.append("| --- | --- | --- | --- |")
    for case in report["cases"]:
        times = dict(case["seconds"])
        ours = times.pop("winnow", None)
        cells = [f"{name} {t / ours:.2f}×" if ours else name for name, t in times.items()]
        cells += [f"{name}: {text}" for name, text in case.get("errors", {}).items()]
        share = f"{case['moved'] / ours / copy:.0%}" if ours else "–"
        if ours and case.get("operations"):
            share += f", {case['operations'] / ours / matmul:.0%}"
        lines.append(
            f"| {case['name']} | {human(ours) if ours else '–'} | {share} | {', '.join(cells)} |"
        )
    return lines


def summary(out: Path, machine: dict, done: list[Step]) -> str:
    name = machine["gpu"] or "no GPU: a rehearsal on the host, the figures mean nothing"
    lines = [f"# gpu-check, {date.today()}", "", f"{name}; torch {machine['torch']}, "]
    lines[-1] += f"CUDA {machine['cuda']}"
    path = out / "bench.json"
    report = json.loads(path.read_text()) if path.exists() else None
    if report:
        rates = report["limits"]
        lines.append(
            f"measured in this run: copy {rates['copy_bytes_per_s'] / 1e12:.2f} TB/s, "
            f"bf16 matmul {rates['matmul_per_s'] / 1e12:.0f} TFLOP/s"
        )
    if machine["gpu"] and sanitizer() is None:
        lines.append("compute-sanitizer is not on this machine: nothing was sanitized")
    lines += ["", "| step | result | time | last line |", "| --- | --- | --- | --- |"]
    for step in done:
        last = step.last_line(out).replace("|", "/")[:120]
        lines.append(f"| {step.name} | {step.status} | {step.seconds:.0f} s | {last} |")
    if report:
        lines += ["", *table(report)]
    return "\n".join(lines) + "\n"


def main() -> int:
    if len(sys.argv) != 2:
        raise SystemExit("usage: make gpu-check OUT=folder")
    started = time.monotonic()
    out = Path(sys.argv[1]).resolve()
    out.mkdir(parents=True, exist_ok=True)
    (out / "bench.json").unlink(missing_ok=True)
    described = subprocess.run([sys.executable, "-c", DESCRIBE], capture_output=True, text=True)
    if described.returncode:
        raise SystemExit(f"torch does not import here:\n{described.stderr}")
    machine = json.loads(described.stdout.splitlines()[-1])
    (out / "machine.json").write_text(json.dumps(machine, indent=1))
    done = steps(out, machine["gpu"] is not None)
    for step in done:
        print(f"{step.name} ...", flush=True)
        step.run(out, BUDGET_S - (time.monotonic() - started))
        print(f"{step.name}: {step.status}, {step.seconds:.0f} s", flush=True)
        if step.name == "build" and step.status != "ok":
            break
    text = summary(out, machine, done)
    (out / "summary.md").write_text(text)
    print(f"\n{text}")
    return 0 if all(step.status == "ok" for step in done) else 1


if __name__ == "__main__":
    sys.exit(main())
