# SPDX-License-Identifier: Apache-2.0
"""What is compared: torch.optim.SGD, CSGD as the optimizer, and the calibration layer with torch.optim.SGD."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import csgd_cuda
from csgd_cuda import GradientCalibration

NAMES = ("sgd", "csgd", "layer")


@dataclass(frozen=True)
class Method:
    """name: "sgd", "csgd", "layer-output" or "layer-weight"; calibration: c, None for SGD, which has none."""

    name: str
    calibration: float | None = None

    @property
    def label(self) -> str:
        """For file names: the name, with c where there is one."""
        return self.name if self.calibration is None else f"{self.name}-c{self.calibration:g}"

    def calibrate(self, model: nn.Module, seed: int) -> None:
        """Puts calibration layers into the model, where the method is that."""
        if self.name.startswith("layer"):
            where = self.name.removeprefix("layer-")
            types = (nn.Conv2d, nn.Linear)
            csgd_cuda.calibrate(model, types=types, where=where, calibration=self.calibration, seed=seed)

    def optimizer(self, model: nn.Module, lr: float, seed: int, **options) -> Optimizer:
        """The optimizer of the model's parameters; ``options``: momentum, weight_decay, nesterov."""
        if self.name == "csgd":
            return csgd_cuda.CSGD(model.parameters(), lr=lr, calibration=self.calibration, seed=seed, **options)
        return torch.optim.SGD(model.parameters(), lr=lr, **options)

    def density_sample(self, model: nn.Module, optimizer: Optimizer) -> DensitySample:
        """To be made between the backward pass and the step whose density is asked for."""
        return DensitySample(self, model, optimizer)


def grid(names: list[str], calibrations: list[float], where: str) -> list[Method]:
    """The methods of ``names``, each with every strength of the calibration but SGD, which has none."""
    methods = []
    for name in dict.fromkeys(names):
        if name == "sgd":
            methods.append(Method("sgd"))
        else:
            full = f"layer-{where}" if name == "layer" else name
            methods += [Method(full, calibration) for calibration in dict.fromkeys(calibrations)]
    return methods


class DensitySample:
    """Share of the coordinates that a step moves: what CSGD counts, for SGD what has other bits than before.

    With the layer it is the share of the calibrated gradients' coordinates that its backward passes let through.
    Made before the step, asked after it.
    """

    def __init__(self, method: Method, model: nn.Module, optimizer: Optimizer):
        self._method, self._optimizer = method, optimizer
        self._layers = [m for m in model.modules() if isinstance(m, GradientCalibration)]
        self._parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self._before: list[Tensor] = []
        if method.name == "sgd":
            self._before = [p.detach().clone() for p in self._parameters]

    def share(self) -> float:
        """0 to 1, over all parameters or calibrated gradients."""
        if self._method.name == "csgd":
            return self._optimizer.overall_density()
        sizes = [p.numel() for p in self._parameters]
        if self._method.name == "sgd":
            pairs = zip(self._parameters, self._before, strict=True)
            moved = [torch.count_nonzero(p.detach() != before).item() for p, before in pairs]
        else:
            tallies = torch.stack([layer.tally[:2] for layer in self._layers])
            moved, sizes = tallies[:, 0].tolist(), tallies[:, 1].tolist()
        return sum(moved) / sum(sizes)
