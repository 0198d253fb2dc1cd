"""The demo's text: the Python standard library's own sources, as bytes.

Every machine that runs the demo has them. Whole files are held out, chosen by a hash of their path,
so that no held-out byte comes from a file that the models have read.
"""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["Text", "load"]

# Not sources of the library (installed packages, bundled wheels), or no prose of programs (tests
# with their data, tables of characters, generated documentation).
_SKIPPED = {
    "site-packages",
    "dist-packages",
    "_bundled",
    "test",
    "tests",
    "encodings",
    "pydoc_data",
}
_HELD_OUT_SHARE = 10  # one file in ten
_LEAST_BYTES = 1_000_000


@dataclass(frozen=True)
class Text:
    """Bytes ``(N,)`` uint8 to train on and to be measured on; files end with a zero byte.

    ``fingerprint`` names the text: it changes with any byte of it.
    """

    train: Tensor
    held_out: Tensor
    fingerprint: str

    def windows(self, count: int, length: int, generator: torch.Generator) -> Tensor:
        """``(count, length)`` int64 pieces of the training text from random places."""
        starts = torch.randint(len(self.train) - length + 1, (count, 1), generator=generator)
        return self.train[starts + torch.arange(length)].long()

    def held_out_windows(self, count: int, length: int) -> Tensor:
        """``(count, length)`` int64 pieces spread evenly over the held-out text."""
        starts = torch.linspace(0, len(self.held_out) - length, count).long()[:, None]
        return self.held_out[starts + torch.arange(length)].long()


def load(folder: Path | None = None) -> Text:
    """Reads the ``*.py`` files under ``folder``, by default the standard library's.

    Raises:
        RuntimeError: if there is too little text, as with a stripped or zipped Python.
    """
    if folder is None:
        folder = Path(sysconfig.get_path("stdlib"))
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    digest = hashlib.sha256()
    for path in _sources(folder):
        name = path.relative_to(folder).as_posix()
        content = path.read_bytes()
        chosen = hashlib.sha256(name.encode()).digest()[0] % _HELD_OUT_SHARE == 0
        parts[chosen].append(content + b"\0")
        digest.update(b"%d %d " % (chosen, len(content)) + content)
    train, held_out = (b"".join(part) for part in parts)
    if min(len(train), _HELD_OUT_SHARE * len(held_out)) < _LEAST_BYTES:
        raise RuntimeError(
            f"{folder}: expected the Python standard library's sources (at least "
            f"{_LEAST_BYTES:,} bytes of *.py files), found {len(train) + len(held_out):,} bytes. "
            "Run the demo with a Python that carries them, such as python.org's or a "
            "distribution's full package."
        )
    return Text(_bytes(train), _bytes(held_out), digest.hexdigest())


def _sources(folder: Path) -> Iterator[Path]:
    """Files in an order that is the same everywhere; skipped folders, often large, are not read."""
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(set(folders) - _SKIPPED)
        for name in sorted(files):
            if name.endswith(".py"):
                yield Path(parent, name)


def _bytes(content: bytes) -> Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)
