"""What a source distribution holds: ``python tests/sdist_gate.py dist/*.tar.gz`` in a checkout.

Fails where it lacks a file that is under version control, holds one that is not, or has other
bytes: what is built from it is then what the checkout builds, at the price of a listing.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tarfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
LEFT_OUT = (".ci/", ".github/", "bench/results/")  # pyproject.toml: sdist.exclude
GENERATED = {"PKG-INFO"}


def tracked() -> dict[str, bytes]:
    command = ["git", "-C", ROOT, "ls-files", "-z"]
    names = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\0")
    kept = (name for name in names if name and not name.startswith(LEFT_OUT))
    return {name: (ROOT / name).read_bytes() for name in kept}


def held(archive: Path) -> dict[str, bytes]:
    """Contents by name below the one folder that everything lies in."""
    folder = archive.name.removesuffix(".tar.gz")
    with tarfile.open(archive) as files:
        return {
            str(Path(member.name).relative_to(folder)): files.extractfile(member).read()
            for member in files.getmembers()
            if member.isfile()
        }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("archive", type=Path)
    wanted, found = tracked(), held(parser.parse_args().archive)
    wrong = {
        "lacks": wanted.keys() - found.keys(),
        "should not hold": found.keys() - wanted.keys() - GENERATED,
        "has changed": {
            name for name in wanted.keys() & found.keys() if wanted[name] != found[name]
        },
    }
    for what, names in wrong.items():
        for name in sorted(names):
            print(f"{what}: {name}")
    print(f"{len(found)} files in the source distribution")
    return int(any(wrong.values()))


if __name__ == "__main__":
    sys.exit(main())
