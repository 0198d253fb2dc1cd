"""Every message that the sources can raise, read from them: ``python tests/error_messages.py``.

A message is what the raising statement spells out, with ``{}`` where it fills in what came. Python
is read with ``ast``, C++ with a few regular expressions that know the two ways of raising there,
``WINNOW_CHECK(condition, parts...)`` and ``fail(parts...)``, beside a plain ``throw``.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "python" / "torch_winnow"
NATIVE = ROOT / "csrc"
NOT_THE_OPERATORS = ("reference", "demo")  # definitions are checked by nobody; a demo is no API


@dataclass(frozen=True)
class Message:
    place: str  # file and line
    kind: str  # of the exception
    text: str

    @property
    def pattern(self) -> re.Pattern[str]:
        """What a raised message of this kind looks like."""
        return re.compile(".*".join(map(re.escape, self.text.split("{}"))), re.DOTALL)


def _text(node: ast.expr) -> str:
    """The literal parts of an expression that makes a string."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(v) if isinstance(v, ast.Constant) else "{}" for v in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _text(node.left) + _text(node.right)
    return "{}"


def of_python(path: Path) -> Iterator[Message]:
    for node in ast.walk(ast.parse(path.read_text())):
        if not (isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call)):
            continue  # a bare raise hands on what was raised elsewhere
        place = f"{path.relative_to(ROOT)}:{node.lineno}"
        arguments = [_text(argument) for argument in node.exc.args]
        yield Message(place, ast.unparse(node.exc.func), "".join(arguments))


LITERAL = re.compile(r'"((?:[^"\\]|\\.)*)"')
RAISING = re.compile(r"\b(WINNOW_CHECK|fail|throw ([\w:]+))\(")


def _arguments(source: str, start: int) -> list[str]:
    """The arguments of the call whose parenthesis opens just before ``start``."""
    arguments, depth, at, begin = [], 0, start, start
    while depth >= 0:
        literal = LITERAL.match(source, at)
        if literal:
            at = literal.end()
            continue
        depth += (source[at] in "([{") - (source[at] in ")]}")
        if depth < 0 or (depth == 0 and source[at] == ","):
            arguments.append(source[begin:at])
            begin = at + 1
        at += 1
    return arguments


def _part(argument: str) -> str:
    """A literal as it is, or with holes where it is added to what came."""
    return (
        re.sub(r"(\{\})+", "{}", "{}".join(LITERAL.findall(argument)))
        if (not LITERAL.sub("", argument).strip())
        else "{}"
    )


def of_native(path: Path) -> Iterator[Message]:
    source = re.sub(r"//[^\n]*", lambda comment: " " * len(comment[0]), path.read_text())
    for found in RAISING.finditer(source):
        arguments = _arguments(source, found.end())
        place = f"{path.relative_to(ROOT)}:{source.count(chr(10), 0, found.start()) + 1}"
        if "Args" in arguments[0] or arguments[-1].strip() in ("...", "text.str()", ""):
            continue  # the two ways themselves
        if found[1] == "WINNOW_CHECK":
            del arguments[0]
        if found[2]:  # one expression of sums
            parts = re.split(r"\s\+\s", arguments[0])
            yield Message(place, found[2], "".join(map(_part, parts)))
        else:
            literal = ["".join(LITERAL.findall(a)) if _part(a) != "{}" else "{}" for a in arguments]
            yield Message(place, "ValueError", "".join(literal))


def messages() -> list[Message]:
    python = [
        path
        for path in sorted(PACKAGE.rglob("*.py"))
        if path.relative_to(PACKAGE).parts[0] not in NOT_THE_OPERATORS
    ]
    native = sorted(p for p in NATIVE.rglob("*") if p.suffix in (".h", ".cuh", ".cpp", ".cu"))
    return [m for p in python for m in of_python(p)] + [m for p in native for m in of_native(p)]


# Raised where a user stands outside of a test (an import, a subprocess), in front of a GPU, or
# never: a guard behind another check.
OUTSIDE = re.compile(
    r"(python/torch_winnow/(__init__|_library|_fake)\.py|csrc/common/(device|device_cuda|tensors)\.h"
    r"|csrc/attention/attention_call\.h|.*\.cuh?):|.*expected a CPU tensor like|.*out of memory"
)


def not_among(raised: Iterable[str]) -> list[str]:
    """The messages that none of the texts is an instance of."""
    texts = list(raised)
    return [
        f"{message.place}: {message.text}"
        for message in messages()
        if not OUTSIDE.match(f"{message.place}: {message.text}")
        and not any(message.pattern.fullmatch(text) for text in texts)
    ]


if __name__ == "__main__":
    for message in messages():
        print(f"{message.place}: {message.kind}: {message.text}")
