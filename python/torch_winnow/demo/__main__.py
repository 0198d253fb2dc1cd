"""``python -m torch_winnow.demo``: trains, measures, prints one table, saves one figure."""

from __future__ import annotations

import argparse
import sys
import textwrap
import time
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m torch_winnow.demo",
        description="Trains three small models on the Python standard library's sources and "
        "measures what each family of operators saves them. About eight minutes on two cores, "
        "less from the second run on (checkpoints are kept).",
    )
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path(".demo"),
        help="where checkpoints, the table and the figure go (default: %(default)s)",
    )
    folder: Path = parser.parse_args().folder
    try:
        import matplotlib  # noqa: F401
        import tabulate  # noqa: F401
        import tqdm  # noqa: F401
    except ModuleNotFoundError as error:
        raise SystemExit(
            f"the demo needs {error.name}: pip install 'torch-winnow[demo]'"
        ) from error

    import torch_winnow
    from torch_winnow.demo import block_sparse, generation, infilling, report, steering, train

    start = time.perf_counter()
    print(torch_winnow.build_info(), flush=True)
    context = train.prepare(folder)
    sections = []
    for module in (generation, infilling, steering, block_sparse):
        sections.append(module.run(context))
        print(f"\n{sections[-1].title}\n{textwrap.fill(sections[-1].meaning, 100)}", flush=True)
    table = report.table(sections)
    report.write_whole(folder / "table.md", lambda path: path.write_text(table + "\n"))
    report.figure(sections, folder / "figure.png")
    print(f"\n{table}\n")
    print(f"written: {folder / 'table.md'}, {folder / 'figure.png'}")
    print(f"all of it took {(time.perf_counter() - start) / 60:.1f} minutes")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("interrupted; finished checkpoints are kept, nothing half-written is")
