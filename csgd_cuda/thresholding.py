# SPDX-License-Identifier: Apache-2.0
"""Hard thresholding as a function: the kernel's operator where there is one, else pure PyTorch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor

from .aliases import Tensors
from .checks import SUPPORTED_DTYPES, separate_elements
from .functional import choose_backend
from .rows import Rows, memory_order
from .rule import LAYOUTS

STRUCTURES = ("element", "filter", "2:4")
_NORM_LANES = 32  # partial sums of a norm (csrc/core/hard_threshold.h)


@torch.no_grad()
def hard_threshold_(
    params: Iterable[Tensor],
    keeps: Sequence[int] | None,
    *,
    momentum_buffers: Iterable[Tensor] = (),
    masks: Iterable[Tensor] = (),
    structure: Literal["element", "filter", "2:4"] = "element",
    across: bool = False,
    found_inf: Tensor | None = None,
    fused: bool | None = None,
) -> None:
    """H_k in place: exactly k elements or filters stay as they are, those of largest magnitude; the others become +0.

    Of equal magnitudes the one of lower index stays: the position in memory order, as for the random draws (row-major
    for a parameter that is not dense), with ``across`` counted on from tensor to tensor. NaN counts as larger than Inf,
    -0 and +0 as equal. The same bits on every backend.

    Args:
        params: dense tensors of one device, of any shape, float32, float64, bfloat16 or float16. Changed.
        keeps: k for each tensor, or one k for all with ``across``; a k above the number of elements keeps them all.
            Empty for "2:4". None: only ``masks`` are applied.
        momentum_buffers: tensors of the parameters' shapes and dtypes, which become +0 where the parameters are dropped;
            empty: they are left alone.
        masks: bool tensors of the parameters' shapes, with "filter" of shape (filters,). What is False there is dropped
            and cannot survive, even where fewer than k are left; what is dropped becomes False. Empty: none.
        structure: "element"; "filter": k filters, index of dimension 0, of the largest sums of squares (of the stored
            values in float64: element j, counted in memory order, in partial sum j mod 32, these added in halves);
            "2:4": two of each four consecutive indices of dimension 1.
        across: one selection over all tensors, of the largest elements or filters of all. All float64, or none.
        found_inf: float32 tensor with one element: where it is not 0, nothing at all is changed.
        fused: None takes the kernel where there is one, else pure PyTorch; True demands it; False takes the latter.

    Raises:
        ValueError, TypeError: something is wrong with an argument; the message names it, and nothing was changed.
        RuntimeError: ``fused=True`` cannot be had; the message says why.
    """
    params, momentum_buffers, masks = list(params), list(momentum_buffers), list(masks)
    keeps = None if keeps is None else list(keeps)
    if not params:
        return
    if choose_backend(params[0].device, fused).name == "reference":
        _check(params, momentum_buffers, masks, keeps, structure, across, found_inf)
        _reference(params, momentum_buffers, masks, keeps, structure, across, found_inf)
        return
    torch.ops.csgd_cuda.hard_threshold_(
        params, momentum_buffers, masks, keeps, structure=structure, across=across, found_inf=found_inf
    )


def check_structure(param: Tensor, index: int, structure: str) -> None:
    """Raises ValueError for a parameter whose shape the structure does not fit."""
    if structure == "filter" and param.dim() < 2:
        raise ValueError(
            f"parameter {index} has shape {list(param.shape)}: structure 'filter' needs two dimensions or more, of "
            "which the first counts the filters"
        )
    if structure == "2:4" and (param.dim() < 2 or param.shape[1] % 4 != 0):
        raise ValueError(
            f"parameter {index} has shape {list(param.shape)}: structure '2:4' needs a dimension 1 that is divisible "
            "by 4"
        )


def _check_tensors(
    params: Tensors, momentum_buffers: Tensors, masks: Tensors, structure: str, across: bool
) -> None:
    for k, param in enumerate(params):
        if param.layout is not torch.strided:
            raise ValueError(
                f"parameter {k} has layout {param.layout}; hard_threshold_ needs dense (strided) parameters"
            )
        if param.dtype not in SUPPORTED_DTYPES:
            raise TypeError(
                f"parameter {k} has dtype {param.dtype}; hard_threshold_ supports float32, float64, bfloat16 and float16"
            )
        if param.device != params[0].device:
            raise ValueError(
                f"parameter {k} is on {param.device}, expected {params[0].device}, the device of the call's first "
                "parameter"
            )
        check_structure(param, k, structure)
        mask_shape = param.shape[:1] if structure == "filter" else param.shape
        for name, tensors, shape, dtype in (
            ("the parameter", params, param.shape, param.dtype),
            ("momentum_buffer", momentum_buffers, param.shape, param.dtype),
            ("mask", masks, mask_shape, torch.bool),
        ):
            if not tensors:
                continue
            tensor = tensors[k]
            if (tensor.shape, tensor.dtype, tensor.device) != (shape, dtype, param.device):
                raise ValueError(
                    f"parameter {k}: {name} has shape {list(tensor.shape)}, dtype {tensor.dtype} on {tensor.device}; "
                    f"expected shape {list(shape)}, dtype {dtype} on {param.device}"
                )
            if tensor.numel() and not separate_elements(tensor):
                raise ValueError(
                    f"parameter {k}: {name} may overlap itself in memory (an expanded tensor?): clone() it"
                )
        if across and structure == "element" and (param.dtype is torch.float64) != (params[0].dtype is torch.float64):
            raise TypeError(
                f"parameter {k} has dtype {param.dtype} and parameter 0 {params[0].dtype}: across tensors all must be "
                "float64 or none"
            )


def _check(
    params: Tensors, momentum_buffers: Tensors, masks: Tensors, keeps: list[int] | None, structure: str, across: bool,
    found_inf: Tensor | None,
) -> None:  # fmt: skip
    """What csrc/ops/check_hard_threshold.cpp checks, for the reference."""
    if structure not in STRUCTURES:
        raise ValueError(f"structure must be 'element', 'filter' or '2:4', got {structure!r}")
    for name, tensors in (("momentum_buffers", momentum_buffers), ("masks", masks)):
        if tensors and len(tensors) != len(params):
            raise ValueError(
                f"{name} must be empty or have {len(params)} entries, one for each parameter, got {len(tensors)}"
            )
    if keeps is None and not masks:
        raise ValueError("keeps must be given where there are no masks to apply")
    if keeps is not None:
        expected = 0 if structure == "2:4" else 1 if across else len(params)
        if len(keeps) != expected:
            raise ValueError(f"keeps must have {expected} entries, got {len(keeps)}")
        if min(keeps, default=0) < 0:
            raise ValueError(f"keeps must be >= 0, got {min(keeps)}")
    _check_tensors(params, momentum_buffers, masks, structure, across)
    device = params[0].device
    if found_inf is not None and (
        found_inf.numel() != 1 or found_inf.dtype != torch.float32 or found_inf.device != device
    ):
        raise ValueError(f"found_inf must be one Float on {device}, the device of the parameters")


def _keys(values: Tensor, alive: Tensor | None) -> Tensor:
    """Integers in the order of the magnitudes; NaN above Inf, what was dropped for good below 0."""
    values = values if values.dtype is torch.float64 else values.float()
    layout = LAYOUTS[values.dtype]
    bits = values.view(layout.integer) & torch.iinfo(layout.integer).max
    keys = torch.where(values.isnan(), torch.iinfo(layout.integer).max, bits).to(torch.int64)
    return keys if alive is None else torch.where(alive, keys, -1)


def _largest(keys: Sequence[Tensor], keep: int) -> list[Tensor]:
    """Of flat tensors of keys together: which are the ``keep`` largest, of equal ones the first."""
    all_keys = torch.cat(list(keys))
    survivors = torch.zeros_like(all_keys, dtype=torch.bool)
    survivors[torch.sort(all_keys, descending=True, stable=True).indices[:keep]] = True
    return list(survivors.split([len(k) for k in keys]))


def _squared_norms(channels: Tensor) -> Tensor:
    """The sum of the squares of each row, in the order of the kernels."""
    squares = channels.double() * channels.double()
    squares = torch.nn.functional.pad(squares, (0, -squares.shape[1] % _NORM_LANES))
    sums = torch.zeros((len(squares), _NORM_LANES), dtype=torch.float64, device=squares.device)
    for lanes in squares.split(_NORM_LANES, dim=1):
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
        self._rows = [Rows([param], [order])]
        self.values = self._rows[0].matrix[0]
        self.momentum_buffer = self.mask = None
        if momentum_buffer is not None:
            self._rows.append(Rows([momentum_buffer], [order]))
            self.momentum_buffer = self._rows[-1].matrix[0]
        if mask is not None:
            self._rows.append(Rows([mask], [None if self.of_filters else order]))
            self.mask = self._rows[-1].matrix[0]
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
        """Drops all but the survivors (None: what the mask says), for which there is an entry for each element or
        filter."""
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
        for rows in self._rows:
            rows.write_back()


def _reference(
    params: Tensors, momentum_buffers: Tensors, masks: Tensors, keeps: list[int] | None, structure: str, across: bool,
    found_inf: Tensor | None,
) -> None:  # fmt: skip
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
