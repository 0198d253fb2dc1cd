"""Indices that point outside, on a GPU: never followed, never a reason to wait for the device.

On the host the emulator ends a run at the first access outside of a tensor. That no operator waits
is test_cuda_graphs.py's to say.
"""

from __future__ import annotations

import pytest
import torch

from fuzz.indices import NAMES, pointing_outside
from fuzz.spoiling import mapped


@pytest.mark.parametrize(("name", "argument"), [n for n in NAMES if n[0] != "linear_logit_stats"])
def test_no_index_is_followed_outside(gpu, name, argument):
    for arguments in pointing_outside(name, argument):
        on_gpu = {key: mapped(value, lambda x: x.to(gpu)) for key, value in arguments.items()}
        getattr(torch.ops.winnow, name)(**on_gpu)
    if gpu.type == "cuda":
        torch.cuda.synchronize()
