# SPDX-License-Identifier: Apache-2.0
"""Ways to make convolutions sparse: as sparse as they get when half of the steps are made, then fine-tuned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.utils import prune

from csgd_cuda import CSGD
from experiments.methods import Method

DENSE, ONE_SHOT = "dense", "one-shot"
# Name: what it is called in tables, and its options of CSGD; one-shot has none, since torch.nn.utils.prune drops the
# weights of least magnitude at once.
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "threshold": ("hard thresholding, momentum kept", {"dropped_momentum": "keep"}),
    "threshold-cleared": ("hard thresholding, momentum cleared", {"dropped_momentum": "clear"}),
    "threshold-frozen": ("hard thresholding, regrow=False", {"dropped_momentum": "keep", "regrow": False}),
    ONE_SHOT: ("one-shot, torch.nn.utils.prune", {}),
}


@dataclass(frozen=True)
class Pruned(Method):
    """name: one of METHODS, or DENSE; calibration: c of CSGD, which trains all of them.

    structure: "element" or "filter"; sparsity: the share of weights dropped.
    """

    structure: str = DENSE
    sparsity: float = 0.0

    @property
    def label(self) -> str:
        """For file names."""
        return DENSE if self.name == DENSE else f"{self.name}-{self.structure}-{self.sparsity:g}"

    def settings(self) -> dict[str, Any]:
        """For the log."""
        return super().settings() | {"structure": self.structure, "sparsity": self.sparsity}

    def optimizer(self, model: nn.Module, lr: float, seed: int, steps: int, **options) -> CSGD:
        """CSGD that prunes the convolutions only: the rows of the last layer are the model's outputs.

        Hard thresholding raises the sparsity along a cubic ramp from a quarter to half of the steps.
        """
        pruned: dict[str, Any] = {"params": [p for p in model.parameters() if p.dim() == 4]}
        if self.name not in (DENSE, ONE_SHOT):
            ramp = ("cubic", steps // 4, steps // 2)
            pruned |= {"sparsity": self.sparsity, "sparsity_schedule": ramp, "structure": self.structure}
            pruned |= METHODS[self.name][1]
        groups = [pruned, {"params": [p for p in model.parameters() if p.dim() != 4]}]
        return CSGD(groups, lr=lr, calibration=self.calibration, seed=seed, **options)

    def before_step(self, model: nn.Module, step: int, steps: int) -> None:
        """One-shot pruning, before the second half of the steps."""
        if self.name != ONE_SHOT or step != steps // 2:
            return
        for layer in _convolutions(model):
            if self.structure == "filter":
                prune.ln_structured(layer, "weight", self.sparsity, n=2, dim=0)
            else:
                prune.l1_unstructured(layer, "weight", self.sparsity)

    def after_training(self, model: nn.Module) -> None:
        """Leaves plain weights, as hard thresholding does."""
        for layer in _convolutions(model):
            if prune.is_pruned(layer):
                prune.remove(layer, "weight")


def _convolutions(model: nn.Module) -> list[nn.Module]:
    return [layer for layer in model.modules() if isinstance(layer, nn.Conv2d)]
