# SPDX-License-Identifier: Apache-2.0
"""Classification, and in the end the size and speed of the network that is used for inference."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from csgd_cuda import fold
from experiments import data
from experiments.classification.task import Classification, forward_seconds
from experiments.task import DataOptions


class FilterComparison(Classification):
    """As classification; after the last epoch the network is folded."""

    @classmethod
    def create(cls, options: DataOptions) -> FilterComparison:
        """On one of data.READERS."""
        return cls(data.load(options), options.augment)

    @torch.no_grad()
    def final(self, model: nn.Module, name: str, seed: int) -> dict[str, Any]:
        """parameters, folded: numbers of parameters in training and of the folded network; same: whether both give the
        same bits for a batch of test images; inference_ms: median time of the folded network's forward pass for it."""
        plain = fold(model.eval())
        images, _ = next(iter(self.evaluation_batches("test")))
        inputs = self.cast(self.normalised(images))
        same = torch.equal(model(inputs), plain(inputs))
        (seconds,) = forward_seconds([plain], inputs)
        sizes = {"parameters": model, "folded": plain}
        return {
            **{name: sum(p.numel() for p in network.parameters()) for name, network in sizes.items()},
            "same": same,
            "inference_ms": 1000 * seconds,
        }
