# SPDX-License-Identifier: Apache-2.0
"""The options of a parameter group: their checks, and what a loaded group lacks."""

from __future__ import annotations

import operator
from itertools import pairwise

import torch

from .aliases import Group
from .checks import check_options, value_of

_OPTION_NAMES = (
    "lr", "momentum", "dampening", "weight_decay", "calibration", "lipschitz", "bound_decay", "rounding", "seed",
)  # fmt: skip


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
    if group["differentiable"]:
        raise ValueError("differentiable=True is not supported: CSGD steps in place, outside autograd")
    if group["fused"] and group["foreach"]:
        raise ValueError("fused and foreach cannot both be True")
    first = group["first_index"]
    if first is not None and not 0 <= operator.index(first) < 2**32:
        raise ValueError(f"first_index must be None or in 0 ... 2^32-1, got {first}")
