"""A fuzzer that coverage leads, of one kind of call; ``make fuzz`` runs it.

    python guided.py operators|functions CORPUS [libFuzzer's options]

An input is a sequence of choices (:mod:`fuzz.call`), the first of which picks what is called.
Coverage of the operators leads where they were compiled for it (``-fsanitize=fuzzer-no-link``)
and atheris's library was loaded first, that of the package's Python always.
"""

from __future__ import annotations

import inspect
import sys
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).parents[1]))
from fuzz.functions import FUNCTIONS, try_function
from fuzz.operators import SCHEMAS, try_operator

TARGETS = {
    "operators": (sorted(SCHEMAS), try_operator),
    "functions": (sorted(FUNCTIONS), try_function),
}


def instrument() -> None:
    """Every function of the package, in place: an editable install has an importer of its own."""
    for name, module in list(sys.modules.items()):
        if not name.startswith("torch_winnow"):
            continue
        for found in list(vars(module).values()):
            if getattr(found, "__module__", None) != name:
                continue
            for function in (found, *vars(found).values()) if inspect.isclass(found) else (found,):
                if inspect.isfunction(function):
                    atheris.instrument_func(function)


def main() -> None:
    instrument()
    names, attempt = TARGETS[sys.argv.pop(1)]

    def one_input(data: bytes) -> None:
        choices = atheris.FuzzedDataProvider(data)

        def choose(count: int) -> int:
            return choices.ConsumeIntInRange(0, count - 1)

        attempt(names[choose(len(names))], choose)

    atheris.Setup(sys.argv, one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
