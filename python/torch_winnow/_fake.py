"""What all fake kernels check."""

from __future__ import annotations

from torch import Tensor


def check_same_device(**tensors: Tensor | None) -> None:
    """Refuses tensors on different devices; the first one says which is expected.

    A single meta tensor makes the dispatcher pick the fake kernel. Beside tensors with data, its
    result would be memory that nothing fills. A number on the CPU, a seed say, goes with any
    device, as everywhere in PyTorch.
    """
    first, expected = None, None
    for argument, tensor in tensors.items():
        if tensor is None or (tensor.dim() == 0 and tensor.device.type == "cpu"):
            continue
        if expected is None:
            first, expected = argument, tensor.device
        elif tensor.device != expected:
            raise ValueError(
                f"{argument}: expected a tensor on {expected} like {first}, got one on "
                f"{tensor.device}"
            )
