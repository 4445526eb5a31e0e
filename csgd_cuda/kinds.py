# SPDX-License-Identifier: Apache-2.0
"""The kinds of values that options and arguments take. A value of another kind gets an error that names the option.

Options often come from configuration files, where 1e-3 is text in YAML, and where "False" would count as true.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any

import torch
from torch import Tensor

_LONGEST = 60  # characters of a value in a message


@dataclass(frozen=True)
class Kind:
    """What an option takes.

    Attributes:
        expected: for messages, where it follows "must be".
        accepts: whether a value is of this kind.
    """

    expected: str
    accepts: Callable[[Any], bool]

    def check(self, name: str, value: Any) -> None:
        """Raises TypeError, which names the option, the value and its type, for a value of another kind."""
        if not self.accepts(value):
            text = repr(value)
            text = text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
            raise TypeError(f"{name} must be {self.expected}, got {text} of type {type(value).__name__}")

    def or_none(self) -> Kind:
        """The kind that takes None, too."""
        return Kind(f"None or {self.expected}", lambda value: value is None or self.accepts(value))

    def described(self, expected: str) -> Kind:
        """The same kind, described in other words."""
        return replace(self, expected=expected)


def _is_number(value: Any) -> bool:
    if isinstance(value, (float, int)):  # the first question, since it is also asked in compiled code
        return not isinstance(value, bool)
    return is_number_tensor(value) or isinstance(value, Real)  # among these the scalars of NumPy


def is_number_tensor(value: Any) -> bool:
    """Whether it is a tensor of real numbers. How many there are is left to the check of the value."""
    return isinstance(value, torch.Tensor) and value.dtype is not torch.bool and not value.dtype.is_complex


def _is_integer(value: Any) -> bool:
    if isinstance(value, bool) or (isinstance(value, torch.Tensor) and value.dtype is torch.bool):
        return False
    try:
        operator.index(value)
    except TypeError:
        return False
    return True


def _is_flag(value: Any) -> bool:
    if isinstance(value, (bool, int)):
        return value in (0, 1)
    dtype = getattr(value, "dtype", None)  # of NumPy
    return getattr(dtype, "kind", None) == "b" and getattr(value, "shape", None) == ()


def instance_of(types: type | tuple[type, ...], expected: str) -> Kind:
    """The kind of the instances of a class."""
    return Kind(expected, lambda value: isinstance(value, types))


# A tensor with one element counts as a number, too: it is read once, lr aside.
NUMBER = Kind("a number", _is_number)
INTEGER = Kind("an integer", _is_integer)
FLAG = Kind("True or False", _is_flag)
TEXT = instance_of(str, "a text")
TENSOR = instance_of(torch.Tensor, "a tensor")
OPTIONAL_TENSOR = TENSOR.or_none()
MODULE = instance_of(torch.nn.Module, "a torch.nn.Module")
FUSED = FLAG.or_none()


def tensor_list(name: str, tensors: Iterable[Tensor]) -> list[Tensor]:
    """The tensors of an argument as a list; raises TypeError, which names it, for anything else."""
    if isinstance(tensors, (torch.Tensor, str)) or not isinstance(tensors, Iterable):
        raise TypeError(f"{name} must be a list of tensors, got a {type(tensors).__name__}")
    listed = list(tensors)
    for k, tensor in enumerate(listed):
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name} must be a list of tensors, but entry {k} is a {type(tensor).__name__}")
    return listed


def integer_list(name: str, integers: Iterable[int]) -> list[int]:
    """The integers of an argument as a list; raises TypeError, which names it, for anything else."""
    if isinstance(integers, str) or not isinstance(integers, Iterable):
        raise TypeError(f"{name} must be a list of integers, got {integers!r} of type {type(integers).__name__}")
    listed = list(integers)
    for k, integer in enumerate(listed):
        INTEGER.check(f"{name}: entry {k}", integer)
    return [operator.index(integer) for integer in listed]
