# SPDX-License-Identifier: Apache-2.0
"""The options of a parameter group that is pruned: their table, and the schedule of its sparsity."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any, Literal, TypedDict

from ..kinds import FLAG, INTEGER, NUMBER, TEXT, Kind, instance_of
from ..optim.options import Option, check_any, check_options
from ..tensors import Group

STRUCTURES = ("element", "filter", "2:4")


class PruningOptions(TypedDict, total=False):
    """Options of the optimizers, each for a parameter group: x becomes H_k(x - lr * step), docs/pruning.md.

    Parameters with fewer than two dimensions (biases, norms) are never thresholded, nor are frozen ones.
    """

    sparsity: float  # target share of zeros in [0, 1); 0: off
    sparsity_schedule: tuple[Literal["cubic"], int, int] | None  # None: constant; a ramp between two steps
    threshold_every: int  # steps
    structure: Literal["element", "filter", "2:4"]
    filter_dim: Literal[0, 1]  # that counts the filters: 0 for Linear and Conv, 1 for ConvTranspose
    threshold_scope: Literal["layer", "group"]  # the share of each parameter, or of the group's together
    regrow: bool  # False: dropped weights stay zero; their gradients count as 0, and stay as they are in .grad
    dropped_momentum: Literal["keep", "clear"]


def _check_share_of_zeros(name: str, value: float) -> None:
    if not 0 <= float(value) < 1:
        raise ValueError(f"{name} must be in [0, 1), got {value}")


def _check_schedule(name: str, value: Any) -> None:
    if value is not None and not _is_ramp(value):
        raise ValueError(f"{name} must be None or ('cubic', begin, end) with steps 0 <= begin < end, got {value!r}")


def _is_ramp(schedule: Any) -> bool:
    if len(schedule) != 3 or schedule[0] != "cubic":
        return False
    begin, end = schedule[1:]
    return NUMBER.accepts(begin) and NUMBER.accepts(end) and bool(0 <= begin < end < math.inf)


def _check_period(name: str, value: Any) -> None:
    if operator.index(value) < 1:
        raise ValueError(f"{name} must be 1 step or more, got {value}")


def _one_of(*allowed: str) -> tuple[Kind, Callable[[str, Any], None]]:
    """The kind and the check of an option that is one of these texts."""
    expected = f"one of {', '.join(map(repr, allowed))}"

    def check(name: str, value: Any) -> None:
        if value not in allowed:
            raise ValueError(f"{name} must be {expected}, got {value!r}")

    return TEXT.described(expected), check


def _check_filter_dim(name: str, value: Any) -> None:
    if value not in (0, 1):
        raise ValueError(f"{name} must be 0 or 1, got {value!r}")


_SCHEDULE = instance_of((tuple, list), "None or ('cubic', begin, end)")

PRUNING_OPTIONS: dict[str, Option] = {
    "sparsity": Option(
        0.0, NUMBER.described("a number in [0, 1)"), _check_share_of_zeros, None,
        "the target share of zeros, in [0, 1); 0: off.",
    ),
    "sparsity_schedule": Option(
        None, _SCHEDULE.or_none().described(_SCHEDULE.expected), _check_schedule, None,
        'None: constant; ("cubic", begin, end): a ramp between two steps.',
    ),
    "threshold_every": Option(
        1, INTEGER.described("a whole number of steps"), _check_period, None,
        "steps from one thresholding to the next.",
    ),
    "structure": Option("element", *_one_of(*STRUCTURES), None, '"element", "filter" or "2:4".'),
    "filter_dim": Option(
        0, INTEGER.described("0 or 1"), _check_filter_dim, None,
        "the dimension that counts the filters: 0 for Linear and Conv weights, 1 for ConvTranspose weights.",
    ),
    "threshold_scope": Option(
        "layer", *_one_of("layer", "group"), None, "the share of each parameter, or of the group's together."
    ),
    "regrow": Option(
        True, FLAG, check_any, None,
        "False: dropped weights stay zero; their gradients count as 0, and stay as they are in ``.grad``.",
    ),
    "dropped_momentum": Option(
        "clear", *_one_of("keep", "clear"), None,
        "whether the momentum of dropped weights (of AdamW both means) stays or becomes 0.",
    ),
}  # fmt: skip


def pruning_defaults(options: PruningOptions, optimizer: str) -> dict[str, Any]:
    """All pruning options of an optimizer of this class, and the count of its steps with pruning, from the given ones.

    Raises:
        TypeError: there is no such option.
    """
    for name in options:
        if name not in PRUNING_OPTIONS:
            raise TypeError(f"{optimizer} got an unexpected keyword argument {name!r}")
    return {**{name: option.default for name, option in PRUNING_OPTIONS.items()}, **options, "threshold_step": 0}


def check_pruning(group: Group) -> None:
    """Raises ValueError or TypeError for a pruning option of a group that is out of range."""
    check_options(PRUNING_OPTIONS, group)
    sparsity, schedule = group["sparsity"], group["sparsity_schedule"]
    if group["structure"] == "2:4" and sparsity != 0 and (sparsity != 0.5 or schedule is not None):
        raise ValueError(
            f"structure '2:4' has sparsity 0.5 and no sparsity_schedule, got sparsity {sparsity} and {schedule!r}"
        )


def keep_pruning(loaded: Group, own: Group) -> None:
    """Keeps a group's pruning options where the loaded one is of a training without pruning, which has made no steps of
    a schedule."""
    loaded.setdefault("threshold_step", 0)
    if not loaded.get("sparsity") and own["sparsity"]:
        loaded.update({name: own[name] for name in PRUNING_OPTIONS})


def scheduled_sparsity(group: Group, step: int) -> float:
    """The share of zeros after ``step`` steps.

    Source of the cubic ramp: Zhu and Gupta, "To prune, or not to prune", 2017, with an initial sparsity of 0.
    """
    if group["sparsity_schedule"] is None:
        return float(group["sparsity"])
    _, begin, end = group["sparsity_schedule"]
    left = 1.0 - min(max((step - begin) / (end - begin), 0.0), 1.0)
    return float(group["sparsity"] * (1.0 - left**3))
