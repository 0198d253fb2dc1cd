"""effective_sample_size against its definition in plain PyTorch."""

from __future__ import annotations

import pytest
import torch

from torch_winnow import reference
from torch_winnow.resampling import effective_sample_size

IMPLS = {"winnow": effective_sample_size, "definition": reference.effective_sample_size}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", [(1, 64), (4096, 4), (256, 4096), (1, 1_000_000)], ids=str)
def test_effective_sample_size(measure, shape, impl):
    log_weights = torch.randn(shape)
    torch.testing.assert_close(
        IMPLS[impl](log_weights), reference.effective_sample_size(log_weights.double()).float()
    )
    measure(
        f"effective_sample_size {shape[0]}x{shape[1]} float32",
        impl,
        IMPLS[impl],
        inputs=[(torch.randn(shape),) for _ in range(4)],
        moved_bytes=log_weights.nbytes,
    )
