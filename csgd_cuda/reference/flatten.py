# SPDX-License-Identifier: Apache-2.0
"""Tensors flattened in the memory order in which their parameter is stepped, several of one length as a matrix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from ..tensors import Tensors, separate_elements

# The strides in whose order elements count; None: row-major.
Order: TypeAlias = tuple[int, ...] | None


def memory_order(param: Tensor) -> Order:
    """The strides in whose order the elements of ``param`` count; None: row-major."""
    if param.is_contiguous():
        return None
    reach = sum((n - 1) * stride for n, stride in zip(param.shape, param.stride(), strict=True))
    fills_its_memory = reach + 1 == param.numel() and separate_elements(param)
    return param.stride() if fills_its_memory else None


def empty_in_order(like: Tensor) -> Tensor:
    """A new tensor of the shape and dtype of ``like``, with the strides of ``memory_order(like)``."""
    return _empty(like, memory_order(like))


def _empty(like: Tensor, order: Order) -> Tensor:
    if order is None:
        return torch.empty_like(like, memory_format=torch.contiguous_format)
    return torch.empty_strided(like.shape, order, dtype=like.dtype, device=like.device)


def _has_order(tensor: Tensor, order: Order) -> bool:
    if order is None:
        return tensor.is_contiguous()
    return all(s == t for n, s, t in zip(tensor.shape, tensor.stride(), order, strict=True) if n > 1)


class Flattened:
    """``matrix``: a row for each tensor. The memory of a lone tensor itself, where that lies in order, else a copy."""

    def __init__(self, tensors: Tensors, orders: Sequence[Order]) -> None:
        self._copies: list[tuple[Tensor, Tensor]] = []  # (tensor, its copy in the order that is needed)
        self._flat = [self._flatten(tensor, order) for tensor, order in zip(tensors, orders, strict=True)]
        self.matrix = self._flat[0].view(1, -1) if len(self._flat) == 1 else torch.stack(self._flat)

    def _flatten(self, tensor: Tensor, order: Order) -> Tensor:
        if not _has_order(tensor, order):
            copy = _empty(tensor, order)
            self._copies.append((tensor, copy.copy_(tensor)))
            tensor = copy
        if order is None:
            return tensor.view(-1)
        return tensor.as_strided((tensor.numel(),), (1,), tensor.storage_offset())

    def write_back(self) -> None:
        """Copies the matrix to the tensors, where it is not their own memory."""
        if len(self._flat) > 1:
            torch._foreach_copy_(self._flat, self.matrix.unbind())
        for tensor, copy in self._copies:
            tensor.copy_(copy)
