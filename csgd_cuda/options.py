# SPDX-License-Identifier: Apache-2.0
"""The options of a parameter group: their checks, and what a loaded group lacks."""

from __future__ import annotations

import torch

from .aliases import Group
from .checks import check_options

_OPTION_NAMES = (
    "lr", "momentum", "dampening", "weight_decay", "nesterov", "calibration", "lipschitz", "bound_decay", "rounding",
    "seed",
)  # fmt: skip


def complete_group(group: Group, own: Group) -> None:
    """Adds to a loaded group the options it lacks, from ``own``."""
    if "calibration" not in group:  # of torch.optim.SGD: how that one ran is not how this one has to
        group.update({name: own[name] for name in ("fused", "foreach", "differentiable")})
    for name, value in own.items():
        if name != "params":
            group.setdefault(name, value)


def check_group(group: Group) -> None:
    """Checks the options of a group; turns a weight decay given as a tensor into a number, as torch allows it."""
    if isinstance(group["weight_decay"], torch.Tensor):
        group["weight_decay"] = group["weight_decay"].item()
    check_options(**{name: group[name] for name in _OPTION_NAMES})
    if group["differentiable"]:
        raise ValueError("differentiable=True is not supported: CSGD steps in place, outside autograd")
    if group["fused"] and group["foreach"]:
        raise ValueError("fused and foreach cannot both be True")
