# SPDX-License-Identifier: Apache-2.0
"""What an optimizer reports of its steps: coordinates moved, and bounds."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor

from ..distributed.shards import local_tensor
from ..reference.checks import TALLY_WORDS
from ..tensors import Group, State, lasting_tensors


class Tallies:
    """What each step counts, on each device a row for each parameter of all groups.

    A CUDA graph writes to the rows of the step that it holds whenever it is replayed. So they stay in memory as long as
    the optimizer. Where rows become too few, at least twice as many replace them: those kept are never more than these.
    """

    def __init__(self) -> None:
        self.rows_on: dict[torch.device, Tensor] = {}
        self._outgrown: list[Tensor] = []

    def rows(self, device: torch.device, count: int) -> Tensor:
        """int64 of shape (at least ``count``, TALLY_WORDS); -1 coordinates moved before the first step."""
        old = self.rows_on.get(device)
        if old is None or len(old) < count:
            size = count if old is None else max(count, 2 * len(old))
            with lasting_tensors():
                self.rows_on[device] = torch.zeros((size, TALLY_WORDS), dtype=torch.int64, device=device)
            self.rows_on[device][:, 0] = -1
            if old is not None:
                self.rows_on[device][: len(old)] = old
                self._outgrown.append(old)
        return self.rows_on[device]

    def moved(self, param_groups: list[Group]) -> list[tuple[int, int] | None]:
        """For each parameter how many coordinates moved in its last applied step, of how many; None where it has made
        none, is empty, or is on the device meta."""
        counts = {device: rows[:, 0].tolist() for device, rows in self.rows_on.items() if device.type != "meta"}
        moved: list[tuple[int, int] | None] = []
        for index, param in enumerate(p for group in param_groups for p in group["params"]):
            of_device = counts.get(param.device, ())
            count, numel = of_device[index] if index < len(of_device) else -1, local_tensor(param).numel()
            moved.append((count, numel) if count >= 0 and numel else None)
        return moved

    def density(self, param_groups: list[Group]) -> dict[str | int, float]:
        """The share of coordinates that moved in each parameter's last applied step, where there is one."""
        named = zip(parameter_names(param_groups), self.moved(param_groups), strict=True)
        return {name: moved[0] / moved[1] for name, moved in named if moved is not None}

    def overall_density(self, param_groups: list[Group]) -> float | None:
        """The same of all parameters together; None where there is none."""
        known = [moved for moved in self.moved(param_groups) if moved is not None]
        return sum(count for count, _ in known) / sum(numel for _, numel in known) if known else None


def parameter_names(param_groups: list[Group]) -> list[str | int]:
    """The names under which figures of parameters are reported: those of the groups, made from ``named_parameters()``;
    the positions over all groups where they have none, or where one is that of several parameters."""
    names = [name for group in param_groups for name in group.get("param_names") or ()]
    count = sum(len(group["params"]) for group in param_groups)
    return names if len(set(names)) == len(names) == count else list(range(count))


def lipschitz_bounds(param_groups: list[Group], state: State) -> dict[str | int, float]:
    """The bound that each parameter's next step takes; waits once for each device that holds estimates."""
    bounds: list[float] = []
    estimates: dict[torch.device, list[tuple[int, Tensor]]] = defaultdict(list)
    for group in param_groups:
        for param in group["params"]:
            estimate = (state.get(param) or {}).get("lipschitz_bound")
            if group["lipschitz"] is None and estimate is not None:
                estimates[estimate.device].append((len(bounds), estimate))
            bounds.append(0.0 if group["lipschitz"] is None else float(group["lipschitz"]))
    for on_device in estimates.values():
        values = _numbers([estimate for _, estimate in on_device])
        for (place, _), value in zip(on_device, values, strict=True):
            bounds[place] = value
    return dict(zip(parameter_names(param_groups), bounds, strict=True))


def _numbers(scalars: list[Tensor]) -> list[float]:
    """The values of tensors with one element on one device, read at once."""
    if scalars[0].device.type == "meta":
        return [float("nan")] * len(scalars)
    values: list[float] = torch.cat([scalar.reshape(1) for scalar in scalars]).tolist()
    return values
