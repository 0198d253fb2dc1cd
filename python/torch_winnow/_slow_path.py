"""Where a call takes a slower way than it could, and the user can do something about it: say so."""

from __future__ import annotations

import warnings

import torch

_said: set[str] = set()


class SlowPathWarning(UserWarning):
    """A call took a slow way that the caller can avoid; the text says how.

    Each cause is told once in a process. To see none of them::

        warnings.filterwarnings("ignore", category=torch_winnow.SlowPathWarning)
    """


def warn_slow(cause: str, text: str, stacklevel: int = 3) -> None:
    """Say ``text`` the first time that ``cause`` shows; nothing while ``torch.compile`` traces."""
    if torch.compiler.is_compiling() or cause in _said:
        return
    _said.add(cause)
    warnings.warn(text, SlowPathWarning, stacklevel=stacklevel)
