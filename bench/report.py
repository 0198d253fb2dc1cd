"""Runs the benchmarks and turns pytest-benchmark's JSON into a table and a plot.

    python bench/report.py --run              every benchmark, results under bench/results/
    python bench/report.py --run -k cat       those whose name contains "cat"
    python bench/report.py results.json       the table and the plot of an earlier run

A row is one implementation of one shape. "vs ours" is its median over ours (above 1: ours is
faster); "of limit" is the time that the machine's measured read bandwidth or multiply-add rate
would need at least, over its median. Shapes where a rival wins stay in the table, and stand once
more above it. ``results/ratios.png`` shows the newest measurement of every shape.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import statistics
import subprocess
import sys
from collections import defaultdict
from datetime import date
from pathlib import Path
from typing import Any

from tabulate import tabulate

RESULTS = Path(__file__).parent / "results"
OURS = "winnow"


def by_group(benchmarks: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    groups: dict[str, dict[str, dict[str, Any]]] = defaultdict(dict)
    for entry in benchmarks:
        groups[entry["group"]][entry["extra_info"]["impl"]] = entry
    return groups


def human(seconds: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e3), ("µs", 1e6)):
        if seconds * scale >= 1:
            return f"{seconds * scale:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns"


def table(groups: dict[str, dict[str, dict[str, Any]]]) -> str:
    lines = []
    for group, impls in groups.items():
        ours = impls[OURS]["stats"]["median"] if OURS in impls else None
        order = sorted(impls, key=lambda name: (name != OURS, impls[name]["stats"]["median"]))
        for position, name in enumerate(order):
            median = impls[name]["stats"]["median"]
            limit = impls[name]["extra_info"]["limit_s"]
            lines.append(
                (
                    group if position == 0 else "",
                    name,
                    human(median),
                    f"{median / ours:.2f}×" if ours else "",
                    f"{limit / median:.0%}" if limit else "",
                )
            )
    headers = ("op and shape", "implementation", "median", "vs ours", "of limit")
    return tabulate(lines, headers=headers, tablefmt="github", disable_numparse=True)


Row = tuple[str, str, float]  # a shape, its strongest rival, that one's time over ours


def strongest_rivals(groups: dict[str, dict[str, dict[str, Any]]]) -> list[Row]:
    """For each shape the fastest implementation that is not ours, and its time over ours.

    Names that begin as ours are other ways of using it ("winnow, all blocks"), no rivals.
    """
    rows = []
    for group, impls in groups.items():
        rivals = {
            name: entry["stats"]["median"]
            for name, entry in impls.items()
            if not name.startswith(OURS)
        }
        if OURS in impls and rivals:
            name = min(rivals, key=rivals.__getitem__)
            rows.append((group, name, rivals[name] / impls[OURS]["stats"]["median"]))
    return rows


def losses(rows: list[Row]) -> list[Row]:
    """The shapes of which a rival is faster, the worst first."""
    return sorted((row for row in rows if row[2] < 1), key=lambda row: row[2])


def losses_table(rows: list[Row]) -> str:
    lines = [(group, name, f"{ratio:.2f}×") for group, name, ratio in losses(rows)]
    headers = ("op and shape", "faster than ours", "its time over ours")
    return tabulate(lines, headers=headers, tablefmt="github", disable_numparse=True)


def summary(rows: list[Row]) -> str:
    """One line on how often ours is faster than the strongest rival, and by how much."""
    if not rows:
        return "No shape here has a rival."
    wins = sum(ratio >= 1 for *_, ratio in rows)
    median = statistics.median(ratio for *_, ratio in rows)
    return (
        f"Faster than the strongest rival in {wins} of {len(rows)} shapes that have one, "
        f"in the median {median:.1f} times."
    )


def newest_rows() -> list[Row]:
    """Of every shape under ``results`` its newest measurement; names begin with dates."""
    rows: dict[str, Row] = {}
    for path in sorted(RESULTS.glob("*.json")):
        data = json.loads(path.read_text())
        rows |= {row[0]: row for row in strongest_rivals(by_group(data.get("benchmarks", [])))}
    return list(rows.values())


def plot(rows: list[Row], path: Path, columns: int = 1) -> None:
    """A line per operator and a dot per shape: how many times longer the strongest rival takes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    kinds: dict[str, list[float]] = defaultdict(list)
    for group, _, ratio in rows:
        kinds[re.split(r"[ ,]+\S*\d", group)[0]].append(ratio)
    if not kinds:
        return
    names = list(kinds)
    length = -(-len(names) // columns)
    figure, axes = pyplot.subplots(
        1, columns, figsize=(5.0 * columns, 0.9 + 0.21 * length), sharex=True, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for i, axis in enumerate(axes[0]):
        part = names[i * length : (i + 1) * length]
        for y, name in enumerate(part):
            ratios = kinds[name]
            axis.plot([min(ratios), max(ratios)], [y, y], color="#d9d9d9", zorder=1)
            colors = ["#2a7f62" if ratio >= 1 else "#b5483a" for ratio in ratios]
            axis.scatter(ratios, [y] * len(ratios), color=colors, s=22, zorder=2)
        axis.axvline(1, color="black", linewidth=0.8)
        axis.set_xscale("log")
        axis.set_yticks(range(len(part)), part, fontsize=8)
        axis.set_ylim(length - 0.4, -0.6)
        axis.spines[["top", "right"]].set_visible(False)
        axis.xaxis.set_major_formatter(lambda x, _: f"{x:g}×")
    figure.supxlabel("time of the strongest rival over ours; red: the rival is faster", fontsize=9)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def machine(data: dict[str, Any]) -> str:
    info = data["machine_info"]
    extra = data["benchmarks"][0]["extra_info"]
    limits = extra["limits"]
    cpu = info.get("cpu", {}).get("brand_raw", platform.processor())
    return (
        f"{cpu}, {extra['threads']} threads, {extra['cpu_capability']}, torch "
        f"{extra['torch']}; measured in this run: "
        f"read {limits['read_bytes_per_s'] / 1e9:.1f} GB/s, "
        f"fp32 multiply-add {limits['fma_per_s'] / 1e9:.0f} GFLOP/s, "
        f"bf16 {limits['bf16_fma_per_s'] / 1e9:.0f} GFLOP/s"
    )


def text(data: dict[str, Any]) -> str:
    groups = by_group(data["benchmarks"])
    rows = strongest_rivals(groups)
    parts = [machine(data), summary(rows)]
    if losses(rows):
        parts += ["Where rivals still win:", losses_table(rows), "Everything:"]
    return "\n\n".join([*parts, table(groups)]) + "\n"


def run(arguments: list[str]) -> Path:
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{date.today()}-{platform.machine()}.json"
    command = [sys.executable, "-m", "pytest", str(Path(__file__).parent), "-q"]
    command += ["-o", "python_files=bench_*.py", f"--benchmark-json={path}", *arguments]
    status = subprocess.run([*command, "--benchmark-disable-gc", "--benchmark-columns=median,iqr"])
    if status.returncode or not path.exists() or not path.stat().st_size:
        raise SystemExit(f"the benchmarks failed (pytest exited with {status.returncode})")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("json", nargs="?", type=Path, help="an earlier run's JSON")
    parser.add_argument("--run", action="store_true", help="run the benchmarks first")
    options, rest = parser.parse_known_args()
    if options.run == (options.json is not None):
        parser.error("expected either --run or the JSON of an earlier run")
    path = run(rest) if options.run else options.json
    try:
        data = json.loads(path.read_text())
        groups = by_group(data["benchmarks"])
    except (OSError, ValueError, KeyError) as error:
        raise SystemExit(f"{path}: expected pytest-benchmark's JSON, got {error!r}") from error
    if not groups:
        raise SystemExit(f"{path}: no benchmark ran")
    path.with_suffix(".md").write_text(text(data))
    plot(strongest_rivals(groups), path.with_suffix(".png"))
    plot(newest_rows(), RESULTS / "ratios.png", columns=2)
    print(text(data))
    print(f"written: {path.with_suffix('.md')}, {path.with_suffix('.png')}")


if __name__ == "__main__":
    main()
