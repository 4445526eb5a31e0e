# SPDX-License-Identifier: Apache-2.0
"""The options of a parameter group that is pruned: their defaults, their checks, the schedule of its sparsity."""

from __future__ import annotations

import operator
from numbers import Real
from typing import Any, Literal, TypedDict

from ..tensors import Group

STRUCTURES = ("element", "filter", "2:4")


class PruningOptions(TypedDict, total=False):
    """Options of CSGD, each for a parameter group: x becomes H_k(x - lr * step), docs/pruning.md.

    Parameters with fewer than two dimensions (biases, norms) are never thresholded, nor are frozen ones.
    """

    sparsity: float  # target share of zeros in [0, 1); 0: off
    sparsity_schedule: tuple[Literal["cubic"], int, int] | None  # None: constant; a ramp between two steps
    threshold_every: int  # steps
    structure: Literal["element", "filter", "2:4"]
    threshold_scope: Literal["layer", "group"]  # the share of each parameter, or of the group's together
    regrow: bool  # False: what was dropped stays zero; its gradients count as 0, in .grad they stay as they are
    dropped_momentum: Literal["keep", "clear"]


_DEFAULTS: dict[str, Any] = {
    "sparsity": 0.0,
    "sparsity_schedule": None,
    "threshold_every": 1,
    "structure": "element",
    "threshold_scope": "layer",
    "regrow": True,
    "dropped_momentum": "clear",
}


def pruning_defaults(options: PruningOptions) -> dict[str, Any]:
    """All pruning options of an optimizer, and the count of its steps with pruning, from the given ones.

    Raises:
        TypeError: there is no such option.
    """
    for name in options:
        if name not in _DEFAULTS:
            raise TypeError(f"CSGD got an unexpected keyword argument {name!r}")
    return {**_DEFAULTS, **options, "threshold_step": 0}


def check_sparsity(group: Group) -> None:
    """Raises ValueError or TypeError for a pruning option that is out of range."""
    sparsity, schedule = group["sparsity"], group["sparsity_schedule"]
    if not isinstance(sparsity, Real):
        raise TypeError(f"sparsity must be a number in [0, 1), got {sparsity!r}")
    if not 0 <= float(sparsity) < 1:
        raise ValueError(f"sparsity must be in [0, 1), got {sparsity}")
    for name, allowed in (
        ("structure", STRUCTURES),
        ("threshold_scope", ("layer", "group")),
        ("regrow", (True, False)),
        ("dropped_momentum", ("keep", "clear")),
    ):
        if group[name] not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {group[name]!r}")
    every = group["threshold_every"]
    if not isinstance(every, int) and not hasattr(every, "__index__"):  # torch.compile traces the first part alone
        raise TypeError(f"threshold_every must be a whole number of steps, got {group['threshold_every']!r}")
    if operator.index(group["threshold_every"]) < 1:
        raise ValueError(f"threshold_every must be 1 step or more, got {group['threshold_every']}")
    if schedule is not None and not _is_ramp(schedule):
        raise ValueError(
            f"sparsity_schedule must be None or ('cubic', begin, end) with steps 0 <= begin < end, got {schedule!r}"
        )
    if group["structure"] == "2:4" and sparsity != 0 and (sparsity != 0.5 or schedule is not None):
        raise ValueError(
            f"structure '2:4' has sparsity 0.5 and no sparsity_schedule, got sparsity {sparsity} and {schedule!r}"
        )


def _is_ramp(schedule: Any) -> bool:
    if not isinstance(schedule, (tuple, list)) or len(schedule) != 3 or schedule[0] != "cubic":
        return False
    begin, end = schedule[1:]
    return isinstance(begin, Real) and isinstance(end, Real) and bool(0 <= begin < end)  # type: ignore[operator]


def scheduled_sparsity(group: Group, step: int) -> float:
    """The share of zeros after ``step`` steps.

    Source of the cubic ramp: Zhu and Gupta, "To prune, or not to prune", 2017, with an initial sparsity of 0.
    """
    if group["sparsity_schedule"] is None:
        return float(group["sparsity"])
    _, begin, end = group["sparsity_schedule"]
    left = 1.0 - min(max((step - begin) / (end - begin), 0.0), 1.0)
    return float(group["sparsity"] * (1.0 - left**3))
