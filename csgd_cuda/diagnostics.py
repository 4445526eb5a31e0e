# SPDX-License-Identifier: Apache-2.0
"""What CSGD says about itself; nothing of it is needed for a step."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .checks import TALLY_WORDS
from .functional import choose_backend
from .shards import local_tensor


def _numbers(scalars: list[Tensor]) -> list[float]:
    """The values of tensors with one element on one device, read at once."""
    if scalars[0].device.type == "meta":
        return [float("nan")] * len(scalars)
    values: list[float] = torch.cat([scalar.reshape(1) for scalar in scalars]).tolist()
    return values


class Diagnostics:
    """The methods of CSGD that only look."""

    _finish_bounds: Callable[[], None]
    param_groups: list[dict[str, Any]]
    state: defaultdict[Tensor, Any]
    _tallies_on: dict[torch.device, Tensor]  # what the steps on a device count, a row for each parameter index

    def _tallies(self, device: torch.device) -> Tensor:
        """What each step counts, a row for each parameter of all groups; -1 coordinates moved before the first step."""
        tallies = self._tallies_on
        size = sum(len(group["params"]) for group in self.param_groups)
        old = tallies.get(device)
        if old is None or len(old) < size:
            tallies[device] = torch.zeros((size, TALLY_WORDS), dtype=torch.int64, device=device)
            tallies[device][:, 0] = -1
            if old is not None:
                tallies[device][: len(old)] = old
        return tallies[device]

    def density(self) -> list[float]:
        """The share of coordinates that moved in each parameter's last applied step.

        Waits for the device, once per device. Not part of the state: NaN until a parameter has been stepped, for empty
        parameters, and on the device meta. Of a DTensor it is the share of what this process holds.

        Returns:
            Shares in [0, 1], one for each parameter over all groups, in their order.
        """
        counts = {device: rows[:, 0].tolist() for device, rows in self._tallies_on.items() if device.type != "meta"}
        shares = []
        for index, param in enumerate(p for group in self.param_groups for p in group["params"]):
            of_device = counts.get(param.device, ())
            moved = of_device[index] if index < len(of_device) else -1
            numel = local_tensor(param).numel()
            shares.append(moved / numel if moved >= 0 and numel else float("nan"))
        return shares

    def lipschitz_bounds(self) -> list[float]:
        """The bound l on ``|d|`` that each parameter's next step takes, in the unit of the gradient.

        It is the group's ``lipschitz`` where that is given, else the running maximum; 0 where there is none yet, and
        such a step is exact SGD. NaN on the device meta. Waits for the device, once for each that holds running maxima.
        Of a DTensor it is the bound of the whole parameter.

        Returns:
            Numbers >= 0, one for each parameter over all groups, in their order.
        """
        self._finish_bounds()
        bounds: list[float] = []
        estimates: dict[torch.device, list[tuple[int, Tensor]]] = defaultdict(list)
        for group in self.param_groups:
            for param in group["params"]:
                estimate = (self.state.get(param) or {}).get("lipschitz_bound")
                if group["lipschitz"] is None and estimate is not None:
                    estimates[estimate.device].append((len(bounds), estimate))
                bounds.append(0.0 if group["lipschitz"] is None else float(group["lipschitz"]))
        for on_device in estimates.values():
            values = _numbers([estimate for _, estimate in on_device])
            for (place, _), value in zip(on_device, values, strict=True):
                bounds[place] = value
        return bounds

    def backend(self) -> str:
        """The backend that the next step takes: "cpu kernel", "cuda kernel", "reference", or several.

        Raises:
            RuntimeError: a group has ``fused=True``, and there is no kernel for one of its parameters.
        """
        names = {
            choose_backend(param.device, group["fused"]).name
            for group in self.param_groups
            for param in group["params"]
            if param.requires_grad or param.grad is not None
        }
        return ", ".join(sorted(names))
