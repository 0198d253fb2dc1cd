"""Calls of the operators themselves, ``torch.ops.winnow.*``, with arguments that were spoiled."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import torch_winnow  # noqa: F401  (registers the operators)
from fuzz import attention, kvcache, resampling, unmasking
from fuzz.call import Call
from fuzz.spoiling import laid_out_anew, on_meta, overlaps, spoiled, tensors_of

SCHEMAS = {
    schema.name.removeprefix("winnow::"): schema
    for schema in torch._C._jit_get_all_schemas()
    if schema.name.startswith("winnow::")
}
Arguments = dict[str, Any]
ARGUMENTS: dict[str, Callable[[Call], Arguments]] = {
    name: getattr(family, name)
    for family in (attention, resampling, unmasking, kvcache)
    for name in SCHEMAS
    if hasattr(family, name)
}
# What may be raised, and what in its text speaks of the machinery, not of the call.
REFUSALS = (ValueError, RuntimeError, TypeError, IndexError, NotImplementedError)
SIZES = re.compile(r"negative dimension|calculation overflowed")
INTERNAL = re.compile(r"INTERNAL ASSERT|std::|vector::|basic_string|\.cpp:|\.h:\d|bad_|unknown")


def answer(name: str, arguments: Arguments) -> list[Tensor]:
    """The tensors that come out, those that were written to among them."""
    result = getattr(torch.ops.winnow, name)(**arguments)
    out = list(result) if isinstance(result, tuple) else [result]
    out += [arguments[a.name] for a in SCHEMAS[name].arguments if a.is_out or a.alias_info]
    return [value for value in out if value is not None]


def sound(
    name: str, seed: str, wanted: Callable[[Arguments], bool] = lambda arguments: True
) -> Arguments:
    """Arguments of a call that works, the same for a seed."""
    dice = random.Random(f"{name} {seed}")
    while True:
        arguments = ARGUMENTS[name](Call(dice.randrange))
        try:
            if wanted(arguments) and answer(name, arguments):
                return arguments
        except (ValueError, RuntimeError):  # options that exclude each other, a position twice
            pass


def check_refusal(error: Exception, names: set[str]) -> None:
    """An error of a kind that callers expect, that names one of ``names`` and nothing internal."""
    text = str(error)
    if "no fallback function is registered for schema winnow::" in text:
        return  # PyTorch's dispatcher: no argument is a tensor
    assert isinstance(error, REFUSALS), repr(error)
    assert re.search(r"\b(" + "|".join(map(re.escape, names)) + r")\b", text), repr(error)
    assert not INTERNAL.search(text), repr(error)


def spoiled_arguments(name: str, call: Call) -> Arguments:
    schema = SCHEMAS[name]
    known = {argument.name for argument in schema.arguments}
    required = {argument.name for argument in schema.arguments if not argument.has_default_value()}
    arguments = ARGUMENTS[name](call)
    # A list of arguments that misses one, or has one too many, would be refused every time.
    assert required <= arguments.keys() <= known
    for _ in range(call.pick((0, 1, 1, 1, 2, 3))):
        which = call.pick(sorted(arguments))
        arguments[which] = None if call.size(9) == 0 else spoiled(call, arguments[which])
    return arguments


def check_call(name: str, arguments: Arguments) -> None:
    """A result, the same for any strides and of the shapes that the fake says, or a refusal."""
    schema = SCHEMAS[name]
    written = {a.name for a in schema.arguments if a.alias_info and a.alias_info.is_write}
    dense = {key: laid_out_anew(value) for key, value in arguments.items()}
    on_fake = any(x.is_meta for value in arguments.values() for x in tensors_of(value))
    fake = {key: on_meta(value) for key, value in arguments.items()}
    try:
        out = answer(name, arguments)
    except Exception as error:
        absent = isinstance(error, AttributeError) and None in arguments.values()
        if on_fake and (absent or SIZES.search(str(error))):
            return None  # a fake kernel takes what its schema says, and leaves sizes to torch
        return check_refusal(error, {argument.name for argument in schema.arguments})
    if on_fake:
        return None
    for real, told in zip(out, answer(name, fake), strict=True):
        assert (real.shape, real.dtype) == (told.shape, told.dtype), (real, told)
    if any(overlaps(arguments[key]) for key in written):
        return None
    for given_strides, contiguous in zip(out, answer(name, dense), strict=True):
        assert torch.equal(given_strides.nan_to_num(0.1), contiguous.nan_to_num(0.1))
    return None


def try_operator(name: str, choose: Callable[[int], int]) -> None:
    """One call; raises AssertionError, with the arguments, where it is not as it should be."""
    arguments = spoiled_arguments(name, Call(choose))
    given = str(arguments)  # before anything is written to
    try:
        check_call(name, arguments)
    except Exception as error:
        raise AssertionError(f"{name}({given})") from error
