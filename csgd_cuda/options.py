# SPDX-License-Identifier: Apache-2.0
"""The options of a parameter group: their checks, and what a loaded group lacks."""

from __future__ import annotations

import math
import operator
from itertools import pairwise

import torch
from torch import Tensor

from .aliases import Group
from .pruning_options import check_sparsity

_OPTION_NAMES = (
    "lr", "momentum", "dampening", "weight_decay", "calibration", "lipschitz", "bound_decay", "rounding", "seed",
)  # fmt: skip


def value_of(lr: float | Tensor) -> float | None:
    """A learning rate as a number; None for a tensor whose value cannot be looked at without waiting for a GPU.

    Raises:
        ValueError: it is a tensor with more than one element.
    """
    if not isinstance(lr, torch.Tensor):
        return lr
    if lr.numel() != 1:
        raise ValueError(f"lr must be a number or a tensor with one element, got {lr.numel()} elements")
    # Compiled code cannot look, either; the operator does.
    if lr.device.type != "cpu" or lr.layout is not torch.strided or torch.compiler.is_compiling():
        return None
    return lr.item()


def check_options(
    *, lr: float | Tensor, momentum: float, dampening: float, weight_decay: float, calibration: float,
    lipschitz: float | None, bound_decay: float, rounding: str, seed: int,
) -> None:  # fmt: skip
    """Raises ValueError (TypeError for a wrong type) for an option with which no step can be made.

    Every option is a number; ``lr`` may also be a tensor with one element. What torch.optim.SGD refuses in its
    constructor alone is not refused here: schedulers take lr a rounding error below 0, and the momentum to 0 under
    nesterov.
    """
    for name, value in (
        ("lr", value_of(lr)),
        ("momentum", momentum),
        ("dampening", dampening),
        ("weight_decay", weight_decay),
    ):
        # Not math.isfinite, at which torch.compile breaks the graph for a changing lr.
        if value is not None and not -math.inf < value < math.inf:
            raise ValueError(f"{name} must be a finite number, got {value}")
    check_calibration(calibration, lipschitz, bound_decay, rounding)
    check_seed(seed)


def check_calibration(calibration: float, lipschitz: float | None, bound_decay: float, rounding: str) -> None:
    """Raises ValueError for an option of the calibration, of a step or of a gradient, that is out of range."""
    for name, value in (("calibration", calibration), ("lipschitz", 0 if lipschitz is None else lipschitz)):
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} must be a finite number >= 0, got {value}")
    if not 0 <= bound_decay <= 1:
        raise ValueError(f"bound_decay must be in [0, 1], got {bound_decay}")
    if rounding not in ("stochastic", "nearest"):
        raise ValueError(f"rounding must be 'stochastic' or 'nearest', got {rounding!r}")


def signed_seed(seed: int) -> int:
    """The seed as the operators take it, whose integers are signed: that of the same bits."""
    return seed - 2**64 if seed >= 2**63 else seed


def check_seed(seed: int) -> None:
    """Raises ValueError (TypeError for what is no integer) for what is not the seed of a Philox key."""
    if not 0 <= operator.index(seed) < 2**64:
        raise ValueError(f"seed must be in 0 ... 2^64-1, got {seed}")


def complete_group(group: Group, own: Group) -> None:
    """Adds to a loaded group the options it lacks, from ``own``."""
    if "calibration" not in group:  # of torch.optim.SGD: how that one ran is not how this one has to
        group.update({name: own[name] for name in ("fused", "foreach", "differentiable")})
    for name, value in own.items():
        if name != "params":
            group.setdefault(name, value)


def index_ranges(param_groups: list[Group]) -> list[range]:
    """The indices that tell the parameters' random draws apart, as a range for each group.

    Raises:
        ValueError: two parameters would draw the same, or an index is 2^32 or more.
    """
    ranges, position = [], 0
    for group in param_groups:
        size = len(group["params"])
        first = position if group["first_index"] is None else group["first_index"]
        ranges.append(range(first, first + size))
        position += size
        if ranges[-1].stop > 2**32:
            raise ValueError(f"first_index must leave the last parameter an index below 2^32, got {first} for {size}")
    in_order = sorted((r for r in ranges if r), key=lambda r: r.start)
    for before, after in pairwise(in_order):
        if after.start < before.stop:
            raise ValueError(
                f"first_index: two groups have parameters of index {after.start}, which would draw the same random "
                "numbers; let the ranges first_index ... first_index + number of parameters be apart"
            )
    return ranges


def check_new_group(group: Group) -> None:
    """check_group, and what torch.optim.SGD refuses of a user, but not of a scheduler."""
    check_group(group)
    lr = value_of(group["lr"])
    for name, value in (("lr", lr), ("momentum", group["momentum"]), ("weight_decay", group["weight_decay"])):
        if value is not None and value < 0:
            raise ValueError(f"{name} must be a finite number >= 0, got {value}")
    if group["nesterov"] and (group["momentum"] <= 0 or group["dampening"] != 0):
        raise ValueError("nesterov needs momentum > 0 and dampening = 0")


def check_group(group: Group) -> None:
    """Checks the options of a group; turns a weight decay given as a tensor into a number, as torch allows it."""
    if isinstance(group["weight_decay"], torch.Tensor):
        group["weight_decay"] = group["weight_decay"].item()
    check_options(**{name: group[name] for name in _OPTION_NAMES})
    check_sparsity(group)
    if group["differentiable"]:
        raise ValueError("differentiable=True is not supported: CSGD steps in place, outside autograd")
    if group["fused"] and group["foreach"]:
        raise ValueError("fused and foreach cannot both be True")
    first = group["first_index"]
    if first is not None and not 0 <= operator.index(first) < 2**32:
        raise ValueError(f"first_index must be None or in 0 ... 2^32-1, got {first}")
