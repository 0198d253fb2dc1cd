"""Writes the benchmark pages from the JSON of the committed runs; ``conf.py`` calls it."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

DOCS = Path(__file__).parent
BENCH = DOCS.parent / "bench"
sys.path.insert(0, str(BENCH))
report, generation = (importlib.import_module(name) for name in ("report", "generation"))

INTRODUCTION = """\
# Benchmarks

Every table and every dot here is made from the JSON of runs that are kept in `bench/results/`.
Machines are shared and noisy, so rivals run right after ours in one process, and ratios of medians
are what counts. Rivals are the strongest that are known for a shape, and a benchmark compares its
output with the definition before it is timed. {summary}

![A dot per shape, a line per operator](ratios.png)

## Where rivals still win

{losses}

`amax` reads the logits once and is here as the floor of anything that reads them. "matmul +
logit_stats" is two calls of operators that exist: where it wins, `linear_logit_stats` saves memory
and no time.
"""

GENERATION = """\
## 4096 tokens, one by one

Compress & Attend Transformers at four chunk sizes and dense decoders (`make bench-generation`).
{caption}

{table}

Where a dense decoder is faster than the CAT:

{losses}
"""

MEASURED = "```{rst-class} measured\n```\n\n"  # the next table's cells are not wrapped

RUNS = """\
## Every run

```{{toctree}}
:titlesonly:

{names}
```

"vs ours" is a rival's median over ours, so above 1× ours is faster; "of limit" is the time that the
machine's read bandwidth or multiply-add rate, measured in the same run, would need at least (above
100% where data came from a cache, or the machine was quicker than while it was measured).
`make bench` makes such a run of your machine.
"""


def generation_section(path: Path) -> str:
    record = json.loads(path.read_text())
    results = [generation.Result(**entry) for entry in record["results"]]
    lost = [
        (f"{cat.batch}", cat.name, dense.name, f"{dense.seconds / cat.seconds:.2f}×")
        for cat in results
        for dense in results
        if cat.name.startswith("CAT") and not dense.name.startswith("CAT")
        if dense.batch == cat.batch and dense.seconds < cat.seconds
    ]
    headers = ("batch", "slower", "faster", "its time over the CAT's")
    return GENERATION.format(
        caption=path.with_suffix(".md").read_text().split("\n\n")[0] + f" {record['machine']}.",
        table=MEASURED + generation.table(results),
        losses=MEASURED
        + report.tabulate(lost, headers=headers, tablefmt="github", disable_numparse=True),
    )


def write(folder: Path = DOCS / "benchmarks") -> None:
    folder.mkdir(exist_ok=True)
    rows = report.newest_rows()
    losses = MEASURED + report.losses_table(rows)
    text = INTRODUCTION.format(summary=report.summary(rows), losses=losses)
    report.plot(rows, folder / "ratios.png", columns=2)
    names = []
    for path in sorted(report.RESULTS.glob("*.json")):
        data = json.loads(path.read_text())
        if "benchmarks" in data:
            names.append(path.stem)
            report.plot(
                report.strongest_rivals(report.by_group(data["benchmarks"])),
                folder / f"{path.stem}.png",
            )
            tables = report.text(data).replace("| op and shape", MEASURED + "| op and shape")
            page = f"# {path.stem}\n\n{tables}\n![A dot per shape]({path.stem}.png)\n"
            (folder / f"{path.stem}.md").write_text(page)
        else:
            text += "\n" + generation_section(path)
    (folder / "index.md").write_text(text + "\n" + RUNS.format(names="\n".join(names)))
