"""What the libraries of a wheel ask of the machine: ``python tests/abi_gate.py dist/*.whl``.

Lists the undefined symbols of every library by where they come from and fails on one outside of the
stable set: the C functions of torch's stable ABI, the C library, the C++ and compiler runtimes, and
Python's C API in ``_core`` alone. A C++ symbol of torch would tie the wheel to one release of it.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import zipfile
from collections import defaultdict
from pathlib import Path

TORCH = r"(aoti_torch|torch)_[a-z0-9_]+"  # unmangled: torch/csrc/stable and its shims
SYSTEM = r".*@(GLIBC|GLIBCXX|CXXABI|GCC)_[0-9.]+"
WEAK = r"_ITM_(de)?registerTMCloneTable|__gmon_start__|__cxa_finalize"
PYTHON = r"_?Py[A-Za-z0-9_]+"
STABLE = {
    "_core": {"python": PYTHON, "system": SYSTEM, "optional": WEAK},
    "_cpu": {"torch": TORCH, "system": SYSTEM, "optional": WEAK},
    "_cuda": {"torch": TORCH, "system": SYSTEM, "optional": WEAK},
}
NEEDED = r"lib(torch_cpu|torch_cuda|stdc\+\+|m|gcc_s|c|dl|rt|pthread)\.so.*|ld-linux.*"


def output(*command: str | Path) -> list[str]:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


def undefined(library: Path) -> dict[str, list[str]]:
    """Undefined symbols by where they come from; under ``"foreign"`` those outside of the set."""
    origins = STABLE[library.name.split(".")[0]]
    found = defaultdict(list)
    for line in output("nm", "-D", "--undefined-only", library):
        symbol = line.split()[-1]
        matching = (name for name, names in origins.items() if re.fullmatch(names, symbol))
        found[next(matching, "foreign")].append(symbol)
    for line in output("readelf", "-d", library):
        needed = re.search(r"\(NEEDED\).*\[(.+)\]", line)
        if needed and not re.fullmatch(NEEDED, needed[1]):
            found["foreign"].append(needed[1])
        if re.search(r"\((RPATH|RUNPATH)\)", line):
            found["foreign"].append(line.strip())
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("wheels", nargs="+", type=Path)
    failed = False
    for wheel in parser.parse_args().wheels:
        with tempfile.TemporaryDirectory() as folder:
            zipfile.ZipFile(wheel).extractall(folder)
            libraries = sorted(Path(folder).rglob("torch_winnow/*.so"))
            if not libraries:
                sys.exit(f"{wheel}: holds no library of torch_winnow")
            for library in libraries:
                print(f"{wheel.name}: {library.name}")
                for origin, symbols in undefined(library).items():
                    failed |= origin == "foreign"
                    print(f"  {origin}: {', '.join(sorted(symbols))}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
