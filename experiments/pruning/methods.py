# SPDX-License-Identifier: Apache-2.0
"""Ways to make convolutions sparse: as sparse as they get when half of the steps are made, then fine-tuned."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.utils import prune

from csgd_cuda import CSGD, cuttable_weights
from experiments.methods import Method
from tools.program import UserError

DENSE, ONE_SHOT, TORCH_PRUNING = "dense", "one-shot", "torch-pruning"
# Name: what it is called in tables, and its options of CSGD. The last two have none: torch.nn.utils.prune drops the
# weights of least magnitude at once, and torch-pruning takes channels out of the network, in sums of all layers alike.
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "threshold": ("hard thresholding, momentum kept", {"dropped_momentum": "keep"}),
    "threshold-cleared": ("hard thresholding, momentum cleared", {"dropped_momentum": "clear"}),
    "threshold-frozen": ("hard thresholding, regrow=False", {"dropped_momentum": "keep", "regrow": False}),
    ONE_SHOT: ("one-shot, torch.nn.utils.prune", {}),
    TORCH_PRUNING: ("one-shot, torch-pruning", {}),
}

# What is dropped: weights, filters, and filters of those layers alone that export_pruned can cut them out of.
STRUCTURES = ELEMENT, FILTER, CUTTABLE = "element", "filter", "cuttable"

_SIDE = 32  # pixels of the image that torch-pruning follows through the network


@dataclass(frozen=True)
class Pruned(Method):
    """name: one of METHODS, or DENSE; calibration: c of CSGD, which trains all of them.

    structure: one of STRUCTURES, or DENSE; sparsity: the share dropped in each layer that is pruned.
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
        pruned: dict[str, Any] = {"params": [layer.weight for layer in self._layers(model)]}
        if self.name not in (DENSE, ONE_SHOT, TORCH_PRUNING):
            ramp = ("cubic", steps // 4, steps // 2)
            structure = ELEMENT if self.structure == ELEMENT else FILTER
            pruned |= {"sparsity": self.sparsity, "sparsity_schedule": ramp, "structure": structure}
            pruned |= METHODS[self.name][1]
        others = [p for p in model.parameters() if all(p is not weight for weight in pruned["params"])]
        groups = [pruned, {"params": others}]
        return CSGD(groups, lr=lr, calibration=self.calibration, seed=seed, **options)

    def before_step(self, model: nn.Module, step: int, steps: int) -> bool:
        """One-shot pruning, before the second half of the steps."""
        if step != steps // 2:
            return False
        if self.name == TORCH_PRUNING:
            _take_channels_out(model, self.sparsity, self._layers(model))
            return True
        for layer in self._layers(model) if self.name == ONE_SHOT else []:
            if self.structure == ELEMENT:
                prune.l1_unstructured(layer, "weight", self.sparsity)
            else:
                prune.ln_structured(layer, "weight", self.sparsity, n=2, dim=0)
        return False

    def after_training(self, model: nn.Module) -> None:
        """Leaves plain weights, as hard thresholding does."""
        for layer in _convolutions(model):
            if prune.is_pruned(layer):
                prune.remove(layer, "weight")

    def _layers(self, model: nn.Module) -> list[nn.Module]:
        """The convolutions that are pruned."""
        layers = _convolutions(model)
        if self.structure != CUTTABLE:
            return layers
        weights = cuttable_weights(model)
        return [layer for layer in layers if any(layer.weight is weight for weight in weights)]


def check_installed(methods: list[str]) -> None:
    """Raises UserError where a method needs a package that is not there."""
    if TORCH_PRUNING in methods and importlib.util.find_spec("torch_pruning") is None:
        raise UserError(f"--methods {TORCH_PRUNING}: it is not installed; pip install torch-pruning.")


def _take_channels_out(model: nn.Module, share: float, layers: list[nn.Module]) -> None:
    """By torch-pruning, of every group of layers that have channels in common, where all of them are in ``layers``."""
    import torch_pruning

    first = _convolutions(model)[0].weight
    example = torch.zeros(1, first.shape[1], _SIDE, _SIDE, dtype=first.dtype, device=first.device)
    importance = torch_pruning.importance.GroupMagnitudeImportance(p=2)
    kept = [
        layer for layer in model.modules() if isinstance(layer, (nn.Linear, nn.Conv2d)) and layer not in layers
    ]  # the outputs of the linear layer, too
    model.eval()  # or the statistics of normalizations would take in the example
    torch_pruning.pruner.BasePruner(
        model, example, importance=importance, pruning_ratio=share, ignored_layers=kept
    ).step()
    model.train()


def _convolutions(model: nn.Module) -> list[nn.Module]:
    return [layer for layer in model.modules() if isinstance(layer, nn.Conv2d)]
