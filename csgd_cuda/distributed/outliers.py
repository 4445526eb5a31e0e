# SPDX-License-Identifier: Apache-2.0
"""Coordinates beyond the bound, which travel as they are: a byte for the position, mostly, and the value.

A rank's message is the distances between its coordinates, in bytes, and then the values. A byte below 255 says how many
coordinates lie between the last one and the next, 255 that at least so many do, and that another byte goes on.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

_MORE = 255  # in a byte of distances
_IN_CACHE = 2**17  # coordinates
_NORM_AT_ONCE = 2**14  # as many torch adds up in one thread, in the same order whatever the number of threads


@dataclass
class Outliers:
    """Coordinates of one rank in its gradients, counted through them all.

    Attributes:
        positions: int64 of shape (n,), ascending.
        values: shape (n,), of the gradients' dtype.
    """

    positions: Tensor
    values: Tensor


def norm_of(grad: Tensor) -> Tensor:
    """In float64. On a CPU a part at a time: one as long as the gradient takes six times as long to convert."""
    at_once = _NORM_AT_ONCE if grad.device.type == "cpu" else grad.numel()
    parts = (grad[begin : begin + at_once].to(torch.float64) for begin in range(0, grad.numel(), at_once))
    norm: Tensor = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(part) for part in parts]))
    return norm


def take_outliers(grads: list[Tensor], bounds: Tensor) -> Outliers:
    """Sets the coordinates with ``|g| > bound`` to 0, and returns them. Waits for the device to count them.

    Args:
        grads: contiguous, of one dtype and device.
        bounds: of each, float64 of shape (len(grads),), numbers of the gradients' dtype or Inf.
    """
    beyond = torch.empty(sum(grad.numel() for grad in grads), dtype=torch.bool, device=bounds.device)
    begins = _begins(grads)
    for grad, bound, begin in zip(grads, bounds, begins, strict=False):
        at_once = _IN_CACHE if grad.device.type == "cpu" else max(1, grad.numel())
        for k in range(0, grad.numel(), at_once):
            part = grad[k : k + at_once]
            torch.gt(part.abs(), bound, out=beyond[begin + k : begin + k + part.numel()])
    positions = beyond.nonzero().squeeze(1)
    values = []
    for grad, begin, own in zip(grads, begins, _split(positions, begins), strict=False):
        values.append(grad[own - begin])
        grad[own - begin] = 0
    return Outliers(positions, torch.cat(values))


def _begins(grads: list[Tensor]) -> list[int]:
    """Where each gradient begins, counted through them all, and where the last one ends."""
    begins = [0]
    for grad in grads:
        begins.append(begins[-1] + grad.numel())
    return begins


def _split(positions: Tensor, begins: list[int]) -> list[Tensor]:
    """The ascending positions between each of ``begins`` and the next."""
    cuts = torch.searchsorted(positions, torch.tensor(begins, device=positions.device)).tolist()
    return [positions[begin:end] for begin, end in pairwise(cuts)]


def pack_outliers(outliers: Outliers) -> tuple[Tensor, int]:
    """A message, uint8 of shape (bytes,), and how many of its bytes are distances."""
    start = outliers.positions.new_tensor([-1])
    between = torch.diff(outliers.positions, prepend=start) - 1
    more = between // _MORE
    ends = (more + 1).cumsum(0)
    distances = torch.full((int(ends[-1]) if len(ends) else 0,), _MORE, dtype=torch.uint8, device=ends.device)
    distances[ends - 1] = (between - _MORE * more).to(torch.uint8)
    return torch.cat([distances, outliers.values.view(torch.uint8)]), len(distances)


def unpack_outliers(message: Tensor, distances: int, dtype: torch.dtype) -> Outliers:
    """What was packed, given how many bytes of the message are distances, and the dtype of the gradients."""
    steps = message[:distances]
    ends = steps != _MORE
    positions = (steps.to(torch.int64) + ends).cumsum(0)[ends] - 1
    return Outliers(positions, message[distances:].clone().view(dtype))  # a view would have to be aligned


def add_mean(grads: list[Tensor], of_ranks: list[Outliers]) -> None:
    """Adds the mean over the ranks of what was taken: in float64, in the order of the ranks; rounded as torch does."""
    begins = _begins(grads)
    of_grads = zip(*(_of_grads(outliers, begins) for outliers in of_ranks), strict=True)
    for grad, of_grad in zip(grads, of_grads, strict=True):
        at_once = _IN_CACHE if grad.device.type == "cpu" else max(1, grad.numel())
        parts = [*range(0, grad.numel(), at_once), grad.numel()]
        scratch = torch.zeros(min(at_once, grad.numel()), dtype=torch.float64, device=grad.device)
        of_parts = zip(*(_of_grads(outliers, parts) for outliers in of_grad), strict=True)
        for begin, of_part in zip(parts, of_parts, strict=False):
            _add_mean_to(grad[begin : begin + at_once], scratch, of_part)


def _of_grads(outliers: Outliers, begins: list[int]) -> list[Outliers]:
    """Those between each of ``begins`` and the next, counted from there."""
    positions = _split(outliers.positions, begins)
    values = torch.split_with_sizes(outliers.values, [len(own) for own in positions])
    return [Outliers(own - begin, value) for own, begin, value in zip(positions, begins, values, strict=False)]


def _add_mean_to(grad: Tensor, scratch: Tensor, of_ranks: tuple[Outliers, ...]) -> None:
    """The same for a gradient that is no longer than ``scratch``, which is zero before and after."""
    for outliers in of_ranks:
        scratch[outliers.positions] += outliers.values.to(torch.float64)  # no position occurs twice
    means = [scratch[of.positions].div_(len(of_ranks)).add_(grad[of.positions]) for of in of_ranks]
    for outliers, mean in zip(of_ranks, means, strict=True):
        grad[outliers.positions] = mean.to(grad.dtype)  # a coordinate of several ranks is set to one number
        scratch[outliers.positions] = 0
