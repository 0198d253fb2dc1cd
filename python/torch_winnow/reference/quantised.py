"""Definitions of quantised pages: what they hold, and how tokens get there."""

from __future__ import annotations

import torch
from torch import Tensor


def _largest_code(dtype: torch.dtype) -> float:
    return 127.0 if dtype == torch.int8 else torch.finfo(dtype).max


def code_scale(largest: Tensor, dtype: torch.dtype) -> Tensor:
    """The smallest scale of the grid at which magnitudes up to ``largest`` have a code.

    Powers of 2 for float8, of the fourth root of 2 for int8; 0 for 0.
    """
    steps = 4 if dtype == torch.int8 else 1
    grid = (2 ** (torch.arange(steps + 1, dtype=torch.float64) / steps)).float()
    least = (largest / _largest_code(dtype)).clamp(min=torch.finfo(torch.float32).tiny)
    mantissa, exponent = torch.frexp(least)  # mantissa in [0.5, 1)
    scale = torch.ldexp(grid[torch.searchsorted(grid, 2 * mantissa)], exponent - 1)
    return torch.where(largest > 0, scale, 0.0)


def encode(numbers: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """The codes nearest to ``numbers * factor``, ties to even.

    What is too large, infinities included, gets the largest code; a NaN is a NaN in float8, and 0
    in int8, which has none.
    """
    top = torch.finfo(torch.float32).max
    most = _largest_code(dtype)
    codes = (numbers.float().clamp(-top, top) * factor).clamp(-most, most)
    absent = 0.0 if dtype == torch.int8 else torch.nan
    codes = codes.round() if dtype == torch.int8 else codes
    return torch.where(codes.isnan(), absent, codes).to(dtype)


def paged_quantise_(
    key_pages: Tensor,
    value_pages: Tensor,
    key_scales: Tensor,
    value_scales: Tensor,
    key: Tensor,
    value: Tensor,
    block_table: Tensor,
    positions: Tensor,
) -> None:
    """Store tokens in the blocks of their positions (-1: nowhere) as codes of one scale.

    A block's scale is what its largest finite magnitude so far needs. Where new tokens need a
    larger one, the codes that are there are brought to it. A block anew has scale 0, and one whose
    every slot is written becomes new.
    """
    block_size = key_pages.shape[2]
    for pages, scales, tokens in ((key_pages, key_scales, key), (value_pages, value_scales, value)):
        for b in range(len(positions)):
            for entry in sorted({int(p) // block_size for p in positions[b] if p >= 0}):
                t = (positions[b].div(block_size, rounding_mode="floor") == entry).nonzero()[:, 0]
                slot, block = positions[b, t] % block_size, int(block_table[b, entry])
                new = tokens[b][:, t].float()
                finite = torch.where(new.isfinite(), new.abs(), 0.0)
                old = torch.zeros_like(scales[block])
                if len(set(slot.tolist())) < block_size:
                    old = scales[block].clone()
                scale = torch.maximum(old, code_scale(finite.flatten(1).amax(1), pages.dtype))
                for h in range(len(scale)):
                    if 0 < old[h] < scale[h]:
                        ratio = old[h] / scale[h]
                        pages[block, h] = encode(pages[block, h].float(), ratio, pages.dtype)
                    inverse = 1 / scale[h] if scale[h] > 0 else scale[h]
                    codes = encode(new[h], inverse, pages.dtype)
                    for i in range(len(t)):  # of equal positions the last one
                        pages[block, h, slot[i]] = codes[i]
                scales[block] = scale
