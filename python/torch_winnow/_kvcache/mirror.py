"""The tables of a cache where its kernels read them: on a GPU, copies of what the host keeps."""

from __future__ import annotations

import torch
from torch import Tensor

from torch_winnow import _core


def is_apart(device: torch.device) -> bool:
    """Whether kernels on ``device`` read another memory than the host's."""
    return device.type != "cpu"


def pinned(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy on the host from which the device can copy while the host goes on."""
    pin = device.type == "cuda"
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=pin)
    return copy.copy_(tensor)


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """What a tensor of the host holds now, on ``device``; nobody waits for it."""
    if not is_apart(device):
        return tensor
    return pinned(tensor, device).to(device, non_blocking=True)


class TableMirror:
    """Block table and lengths of one cache, kept by the native table, which writes to the host.

    On the CPU kernels read that memory. A GPU has copies, made in the order of its stream: each
    comes from pinned memory of its own, so the host may go on with the next step meanwhile.

    Attributes:
        lengths: ``(B,)`` int32, changed in place.
        table: ``(B, blocks of the longest row)`` int32.
    """

    def __init__(self, native: _core.CacheTable, rows: int, device: torch.device) -> None:
        self._native = native
        self._device = device
        self.is_apart = is_apart(device)
        self._host_lengths = torch.zeros(rows, dtype=torch.int32, device="cpu")
        self.lengths = self._host_lengths
        if self.is_apart:
            self.lengths = torch.zeros(rows, dtype=torch.int32, device=device)
        self._staged = self._positions = torch.empty(0, 0, dtype=torch.int64, device="cpu")
        self._reserve(native.width)
        self.follow()

    def _reserve(self, width: int) -> None:
        """Give the native table a tensor of ``width`` columns to keep in step."""
        shape = self._host_lengths.shape[0], width
        self._host_table = torch.empty(shape, dtype=torch.int32, device="cpu")
        self._wide = self._host_table
        if self.is_apart:
            self._wide = torch.empty(shape, dtype=torch.int32, device=self._device)
        lengths = self._host_lengths.data_ptr()
        self._native.attach(self._host_table.data_ptr(), width, lengths)

    def follow(self) -> None:
        """Catch up with the native table after an operation."""
        width = self._native.width
        if width > self._wide.shape[1]:
            self._reserve(max(width, 2 * self._wide.shape[1]))
        self.table = self._wide[:, :width]
        if self.is_apart:
            for host, copy in ((self._host_table, self._wide), (self._host_lengths, self.lengths)):
                copy.copy_(pinned(host, self._device), non_blocking=True)

    def positions(self, host: Tensor) -> Tensor:
        """Positions for the kernels. All layers of a step have the same: they are sent once."""
        if not self.is_apart:
            return host
        if not torch.equal(self._staged, host):
            self._staged = pinned(host, self._device)
            self._positions = self._staged.to(self._device, non_blocking=True)
        return self._positions
