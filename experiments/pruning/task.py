# SPDX-License-Identifier: Apache-2.0
"""Classification by a chain of convolutions, and the size of what is left of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from csgd_cuda import export_pruned
from experiments import data
from experiments.classification.task import Classification
from experiments.seeding import seeded
from experiments.task import DataOptions

_WIDTHS = (16, 32, 64)


class Pruning(Classification):
    """As classification, in which the trained model is exported without its dead filters."""

    @classmethod
    def create(cls, options: DataOptions) -> Pruning:
        """On one of data.READERS."""
        return cls(data.load(options), options.augment)

    def build_model(self, name: str, seed: int) -> nn.Sequential:
        """Three convolutions with batch normalisation, and a linear layer."""
        with seeded(seed):
            channels, layers = self.size[0], []
            for width in _WIDTHS:
                layers += [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
                layers += [nn.AvgPool2d(2)] if width < _WIDTHS[-1] else [nn.AdaptiveAvgPool2d(1)]
                channels = width
            return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels, self.classes))

    @torch.no_grad()
    def final(self, model: nn.Module, seed: int) -> dict[str, Any]:
        """zeros: share of the convolutions' weights; weights, exported: parameters of the model and of the exported
        one; difference: the largest between the logits of both for test images, relative to the largest logit."""
        images, _ = next(iter(self.evaluation_batches("test")))
        inputs = self.cast(self.normalised(images))
        small, logits = export_pruned(model.eval()), model(inputs)
        weights = [p for p in model.parameters() if p.dim() == 4]
        return {
            "zeros": sum(int((p == 0).sum()) for p in weights) / sum(p.numel() for p in weights),
            "weights": sum(p.numel() for p in model.parameters()),
            "exported": sum(p.numel() for p in small.parameters()),
            "difference": float((small(inputs) - logits).abs().max() / logits.abs().max()),
        }
