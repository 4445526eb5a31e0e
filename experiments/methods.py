# SPDX-License-Identifier: Apache-2.0
"""What is compared: torch.optim.SGD, CSGD as the optimizer, and the calibration layer with torch.optim.SGD."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import csgd_cuda
from csgd_cuda import GradientCalibration

NAMES = ("sgd", "csgd", "layer")


class Together(nn.ModuleDict):
    """Networks that are trained on the same batches, each by an optimizer of its own, as if it were alone."""


@dataclass(frozen=True)
class Method:
    """name: "sgd", "csgd", "layer-output" or "layer-weight"; calibration: c, None for SGD, which has none."""

    name: str
    calibration: float | None = None

    @property
    def label(self) -> str:
        """For file names: the name, with c where there is one."""
        return self.name if self.calibration is None else f"{self.name}-c{self.calibration:g}"

    def settings(self) -> dict[str, Any]:
        """For the log; JSON values."""
        return {"method": self.name, "calibration": self.calibration}

    def network(self, name: str) -> str:
        """The network that is built where ``name`` is compared."""
        return name

    def calibrate(self, model: nn.Module, seed: int) -> None:
        """Puts calibration layers into the model, where the method is that."""
        if self.name.startswith("layer"):
            where = self.name.removeprefix("layer-")
            types = (nn.Conv2d, nn.Linear)
            csgd_cuda.calibrate(model, types=types, where=where, calibration=self.calibration, seed=seed)

    def optimizers(self, model: nn.Module, lr: float, seed: int, steps: int, **options) -> list[Optimizer]:
        """One for the model, or for each network of Together.

        steps: of the whole training; ``options``: momentum, weight_decay, nesterov.
        """
        if not isinstance(model, Together):
            return [self.optimizer(model, lr, seed, steps, **options)]
        # Each network gets the draws that it would get alone; nothing averages over these networks.
        warnings.filterwarnings("ignore", "several optimizers of this process draw the same random numbers")
        return [self.optimizer(network, lr, seed, steps, **options) for network in model.values()]

    def optimizer(self, model: nn.Module, lr: float, seed: int, steps: int, **options) -> Optimizer:
        """That of one network."""
        if self.name == "csgd":
            return csgd_cuda.CSGD(model.parameters(), lr=lr, calibration=self.calibration, seed=seed, **options)
        return torch.optim.SGD(model.parameters(), lr=lr, **options)

    def before_step(self, model: nn.Module, step: int, steps: int) -> bool:
        """Called before step ``step`` (from 0) of ``steps``. True: the model has other parameters now."""
        return False

    def after_training(self, model: nn.Module) -> None:
        """Called after the last epoch."""

    def density_sample(self, model: nn.Module, optimizers: list[Optimizer]) -> DensitySample:
        """To be made between the backward pass and the step whose density it gives."""
        return DensitySample(model, optimizers)


def grid(names: list[str], calibrations: list[float], where: str = "output") -> list[Method]:
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
    Made before the step, read after it.
    """

    def __init__(self, model: nn.Module, optimizers: list[Optimizer]):
        self._optimizers = optimizers
        self._layers = [m for m in model.modules() if isinstance(m, GradientCalibration)]
        self._counted = isinstance(optimizers[0], csgd_cuda.CSGD)
        self._before: list[Tensor] = []
        if not self._counted and not self._layers:
            self._before = [p.detach().clone() for p in self._parameters()]

    def _parameters(self) -> list[Tensor]:
        return [p for optimizer in self._optimizers for group in optimizer.param_groups for p in group["params"]]

    def share(self) -> float:
        """0 to 1, over all parameters or calibrated gradients."""
        if self._counted and len(self._optimizers) == 1:
            return self._optimizers[0].overall_density()
        if self._counted:
            sizes = [sum(p.numel() for g in o.param_groups for p in g["params"]) for o in self._optimizers]
            moved = [o.overall_density() * size for o, size in zip(self._optimizers, sizes, strict=True)]
        elif self._layers:
            tallies = torch.stack([layer.tally[:2] for layer in self._layers])
            moved, sizes = tallies[:, 0].tolist(), tallies[:, 1].tolist()
        else:
            pairs = zip(self._parameters(), self._before, strict=True)
            moved = [torch.count_nonzero(p.detach() != before).item() for p, before in pairs]
            sizes = [before.numel() for before in self._before]
        return sum(moved) / sum(sizes)
