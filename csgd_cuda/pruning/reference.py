# SPDX-License-Identifier: Apache-2.0
"""Hard thresholding in pure PyTorch, by a stable sort. The kernels must give the same bits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..reference.flatten import Flattened, memory_order
from ..reference.rule import LAYOUTS
from ..tensors import Tensors

_NORM_LANES = 32  # partial sums of a norm (csrc/core/hard_threshold.h)


def _ordered_magnitudes(values: Tensor) -> Tensor:
    """Integers >= 0 in the order of the magnitudes, as wide as opmath; NaN above Inf, all NaN equal."""
    values = values if values.dtype is torch.float64 else values.float()
    layout = LAYOUTS[values.dtype]
    quiet_nan = 2**layout.sign_place - layout.above_infinity // 2
    magnitudes = values.view(layout.integer) & (2**layout.sign_place - 1)
    return torch.where(values.isnan(), quiet_nan, magnitudes)


def _keys(values: Tensor, alive: Tensor | None) -> Tensor:
    """Integers in the order of the magnitudes; NaN above Inf, entries that were dropped for good below 0."""
    keys = _ordered_magnitudes(values).to(torch.int64)
    return keys if alive is None else torch.where(alive, keys, -1)


def _largest(keys: Sequence[Tensor], keep: int) -> list[Tensor]:
    """Masks of the ``keep`` largest of all keys, of equal ones the first."""
    all_keys = torch.cat(list(keys))
    survivors = torch.zeros_like(all_keys, dtype=torch.bool)
    survivors[torch.sort(all_keys, descending=True, stable=True).indices[:keep]] = True
    return list(torch.split(survivors, [len(k) for k in keys]))


def _squared_norms(channels: Tensor) -> Tensor:
    """The sum of the squares of each row, in the order of the kernels."""
    squares = channels.double() * channels.double()
    squares = torch.nn.functional.pad(squares, (0, -squares.shape[1] % _NORM_LANES))
    sums = torch.zeros((len(squares), _NORM_LANES), dtype=torch.float64, device=squares.device)
    for lanes in torch.split(squares, _NORM_LANES, dim=1):
        sums = sums + lanes
    while sums.shape[1] > 1:
        half = sums.shape[1] // 2
        sums = sums[:, :half] + sums[:, half:]
    return sums[:, 0]


class _Flat:
    """A parameter and its companions as flat tensors in memory order."""

    def __init__(self, param: Tensor, momentum_buffer: Tensor | None, mask: Tensor | None, structure: str) -> None:
        order = memory_order(param)
        self.of_filters = structure == "filter"
        self._flattened = [Flattened([param], [order])]
        self.values = self._flattened[0].matrix[0]
        self.momentum_buffer = self.mask = None
        if momentum_buffer is not None:
            self._flattened.append(Flattened([momentum_buffer], [order]))
            self.momentum_buffer = self._flattened[-1].matrix[0]
        if mask is not None:
            self._flattened.append(Flattened([mask], [None if self.of_filters else order]))
            self.mask = self._flattened[-1].matrix[0]
        self.shape: tuple[int, int] = (1, 1)  # channels, and consecutive elements that share one
        if structure != "element":
            dim = 0 if self.of_filters else 1
            row_major = param.shape[dim + 1 :].numel()
            inner = row_major if order is None else param.stride(dim)
            channels = param.shape[dim]
            self.shape = (channels, param.numel() if channels == 1 else inner)

    def keys(self) -> Tensor:
        if not self.of_filters:
            return _keys(self.values, self.mask)
        channels, inner = self.shape
        if self.values.numel() == 0:
            norms = torch.zeros(channels, dtype=torch.float64, device=self.values.device)
        else:
            in_channels = self.values.view(-1, channels, inner).transpose(0, 1).reshape(channels, -1)
            norms = _squared_norms(in_channels)
        return _keys(norms, self.mask)

    def two_of_four(self) -> Tensor:
        channels, inner = self.shape
        if self.values.numel() == 0:
            return torch.ones_like(self.values, dtype=torch.bool)
        keys = self.keys().view(-1, channels // 4, 4, inner)
        order = torch.sort(keys, dim=2, descending=True, stable=True).indices[:, :, :2]
        return torch.zeros_like(keys, dtype=torch.bool).scatter_(2, order, True).view(-1)

    def drop(self, survivors: Tensor | None, apply: Tensor | None) -> None:
        """Drops all but the survivors (None: the mask's), of which there is an entry for each element or filter."""
        if survivors is None:
            survivors = torch.ones((), dtype=torch.bool, device=self.values.device)
        if self.mask is not None:
            survivors = survivors & self.mask
        if apply is not None:
            survivors = survivors | ~apply
        if self.mask is not None:
            self.mask &= survivors
        if self.of_filters and self.values.numel():
            channels, inner = self.shape
            in_order = survivors.view(1, channels, 1)
            survivors = in_order.expand(self.values.numel() // (channels * inner), channels, inner).reshape(-1)
        for tensor in (self.values, self.momentum_buffer):
            if tensor is not None and tensor.numel():
                tensor.masked_fill_(~survivors, 0.0)
        for flattened in self._flattened:
            flattened.write_back()


def reference(
    params: Tensors, momentum_buffers: Tensors, masks: Tensors, keeps: list[int] | None, structure: str, across: bool,
    found_inf: Tensor | None,
) -> None:  # fmt: skip
    """hard_threshold_() of checked arguments."""
    apply = None if found_inf is None else found_inf.reshape(()) == 0
    flats = [
        _Flat(param, momentum_buffers[k] if momentum_buffers else None, masks[k] if masks else None, structure)
        for k, param in enumerate(params)
    ]
    survivors: Sequence[Tensor | None]
    if keeps is None:
        survivors = [None] * len(flats)
    elif structure == "2:4":
        survivors = [flat.two_of_four() for flat in flats]
    elif across:
        survivors = _largest([flat.keys() for flat in flats], keeps[0])
    else:
        survivors = [_largest([flat.keys()], keep)[0] for flat, keep in zip(flats, keeps, strict=True)]
    for flat, survive in zip(flats, survivors, strict=True):
        flat.drop(survive, apply)
