"""Arguments that fit together, spoiled: other contents, dtypes, layouts, sizes, kinds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fuzz.call import DTYPES, INTEGERS, NUMBERS, Call


def strange_numbers(call: Call, value: Tensor) -> Tensor:
    """Some elements replaced by what an index or a weight should not be."""
    value = value.clone()
    if value.numel() == 0 or value.dtype == torch.bool:
        return value
    choices = INTEGERS
    if value.is_floating_point() or value.is_complex():
        most = torch.finfo(value.dtype).max
        choices = tuple(x for x in NUMBERS if not most < abs(x) < float("inf"))
    elif value.dtype == torch.int32:
        choices = tuple(i for i in INTEGERS if abs(i) < 2**31) + (-(2**31), 2**31 - 1)
    elif value.dtype == torch.int8:
        choices = (-128, -1, 0, 127)
    value.view(-1)[call.size(value.numel() - 1)] = call.pick(choices)
    return value


def spoiled_tensor(call: Call, value: Tensor) -> Any:
    """The same argument in another layout, of another kind, or with other contents."""
    way = call.pick(("contents", "contents", "dtype", "stride", "rank", "size", "meta"))
    if way == "meta":
        return value.to("meta")
    if way == "contents" and value.is_contiguous():
        return strange_numbers(call, value)
    if way == "dtype":
        return value.to(call.pick(DTYPES))
    if way == "rank":
        return call.pick((value[None], value.flatten(), value[..., None], value.sum()))
    if value.dim() == 0:
        return value
    dim = call.size(value.dim() - 1)
    if way == "size":
        return torch.cat([value, value], dim).narrow(dim, 0, call.size(2 * value.shape[dim]))
    if value.dtype == torch.bool and not value.is_contiguous():
        return value
    padded = torch.cat([value, value], dim)
    return call.pick(
        (
            value.transpose(dim, -1).contiguous().transpose(dim, -1),
            padded.narrow(dim, call.size(value.shape[dim]), value.shape[dim]),
            torch.stack([value, value], dim + 1).flatten(dim, dim + 1)[
                (slice(None),) * dim + (slice(None, None, 2),)
            ],
            value.narrow(dim, 0, 1).expand_as(value) if value.shape[dim] else value,
        )
    )


def spoiled(call: Call, value: Any) -> Any:
    if isinstance(value, Tensor):
        return spoiled_tensor(call, value)
    if isinstance(value, list):
        if not value or call.pick((True, False)):
            return call.pick((value[1:], value + value))
        at = call.size(len(value) - 1)
        return [*value[:at], spoiled(call, value[at]), *value[at + 1 :]]
    if isinstance(value, bool):
        return not value
    if isinstance(value, str):
        return call.pick(("", "nonsense", "systematic"))
    return call.pick((*INTEGERS, *NUMBERS, None))


# What somebody passes who has mixed the arguments up.
STRANGERS = (None, True, -1, 2**70, 0.5, "nonsense", [], (), {}, b"bytes", 1j, object())
STRANGERS += (torch.float32, torch.tensor(1.5), [None], [0.5], [2**70], ["a"])


def estranged(call: Call, value: Any) -> Any:
    """Spoiled, or replaced by something that is of no kind that a function takes."""
    return call.pick(STRANGERS) if call.size(3) == 0 else spoiled(call, value)


def laid_out_anew(value: Any) -> Any:
    return mapped(value, lambda tensor: tensor.clone(memory_format=torch.contiguous_format))


def on_meta(value: Any) -> Any:
    return mapped(value, lambda tensor: tensor.to("meta"))


def mapped(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, list):
        return [mapped(each, function) for each in value]
    return function(value) if isinstance(value, Tensor) else value


def tensors_of(value: Any) -> list[Tensor]:
    """Those in an argument: itself, or the elements of a list."""
    listed = value if isinstance(value, list) else [value]
    return [each for each in listed if isinstance(each, Tensor)]


def overlaps(value: Any) -> bool:
    return isinstance(value, Tensor) and any(
        stride == 0 and size > 1 for stride, size in zip(value.stride(), value.shape, strict=True)
    )
