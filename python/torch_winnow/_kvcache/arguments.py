"""What callers may hand to a cache: tokens, positions, integers, lists of integers."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from numbers import Real
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch_winnow._kvcache.storage import PagedKVCache

_TO_QUANTISE = (torch.float32, torch.bfloat16, torch.float16)
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
_LARGEST = 2**63 - 1  # of the native table


def refuse_gradients(**tensors: Tensor | None) -> None:
    """Raise where autograd would expect a gradient that the cache cannot give."""
    if not torch.is_grad_enabled():
        return
    for argument, tensor in tensors.items():
        # What is no tensor is for the operator to refuse.
        if isinstance(tensor, Tensor) and tensor.requires_grad:
            raise ValueError(
                f"{argument}: requires a gradient, but paged caches serve inference only; call "
                f"under torch.no_grad() or pass {argument}.detach()"
            )


def check_tensors(**tensors: object) -> None:
    """Raise where an argument is no tensor."""
    for argument, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise ValueError(
                f"{argument}: expected a tensor, got {tensor!r} ({type(tensor).__name__})"
            )


def number(argument: str, value: Any) -> float:
    """``value`` as a float: any real number, but no bool."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ValueError(f"{argument}: expected a number, got {value!r} ({type(value).__name__})")
    return float(value)


def integer(argument: str, value: Any) -> int:
    """``value`` as an int of 64 bits: an int, or a scalar of another library that is one."""
    if type(value) is not int:
        try:
            if isinstance(value, bool):  # an index that is a mask is a mistake
                raise TypeError
            value = operator.index(value)
        except TypeError:
            raise ValueError(
                f"{argument}: expected an integer, got {value!r} ({type(value).__name__})"
            ) from None
    if not -_LARGEST <= value <= _LARGEST:
        raise ValueError(f"{argument}: expected an integer of 64 bits, got {value}")
    return int(value)


def integers(argument: str, values: Sequence[int] | Tensor) -> list[int]:
    """A list of ints of 64 bits; an empty tensor of any dtype is an empty list."""
    if isinstance(values, Tensor):
        if values.dim() != 1 or (values.dtype not in _INTEGERS and values.numel() > 0):
            raise ValueError(
                f"{argument}: expected a one-dimensional integer tensor or a list of integers, got "
                f"shape {tuple(values.shape)} of {values.dtype}"
            )
        if values.is_meta:
            raise ValueError(f"{argument}: expected numbers, got a tensor on meta, which has none")
        return values.tolist() if values.numel() > 0 else []
    try:
        listed = list(values)
    except TypeError:
        raise ValueError(
            f"{argument}: expected a list of integers or a one-dimensional integer tensor, got "
            f"{values!r} ({type(values).__name__})"
        ) from None
    if not listed:
        return listed
    # The usual list is checked at the speed of C.
    if set(map(type, listed)) == {int} and max(listed) <= _LARGEST and min(listed) >= -_LARGEST:
        return listed
    return [integer(f"{argument}[{i}]", value) for i, value in enumerate(listed)]


def token_positions(positions: Tensor, rows: int, tokens: int) -> Tensor:
    """Positions ``(B, T)`` as int64 on the CPU."""
    if not isinstance(positions, Tensor):
        raise ValueError(
            f"positions: expected a ({rows}, {tokens}) int32 or int64 tensor, got "
            f"{positions!r} ({type(positions).__name__})"
        )
    if positions.shape != (rows, tokens) or positions.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"positions: expected ({rows}, {tokens}) int32 or int64, got "
            f"{tuple(positions.shape)} of {positions.dtype}"
        )
    return positions.to(device="cpu", dtype=torch.int64).contiguous()


def check_tokens(cache: PagedKVCache, key: Tensor, value: Tensor) -> None:
    """Everything that storing them could refuse, before anything is changed."""
    pool = cache.pool
    for name, tensor in (("key", key), ("value", value)):
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{name}: expected a tensor, got {tensor!r}")
    tokens = key.shape[2] if key.dim() == 4 else 0
    dtypes = _TO_QUANTISE if pool.quantised else (pool.dtype,)
    device = pool.device
    for name, tensor, dim in (("key", key, pool.head_dim), ("value", value, pool.value_head_dim)):
        if tensor.shape != (cache.batch_size, pool.num_kv_heads, tokens, dim):
            raise ValueError(
                f"{name}: expected (B, Hkv, T, D) = ({cache.batch_size}, {pool.num_kv_heads}, "
                f"{tokens if name == 'value' else 'T'}, {dim}), got {tuple(tensor.shape)}"
            )
        if tensor.dtype not in dtypes or tensor.device != device:
            raise ValueError(
                f"{name}: expected {' or '.join(map(str, dtypes))} on {device} as in the pool, got "
                f"{tensor.dtype} on {tensor.device}"
            )
        if dim > 1 and tensor.stride(3) != 1 and tensor.numel() > 0:
            raise ValueError(
                f"{name}: the last dimension must be contiguous (stride 1), got stride "
                f"{tensor.stride(3)}"
            )
    refuse_gradients(key=key, value=value)
