# SPDX-License-Identifier: Apache-2.0
"""Classification by a network that is pruned, and what is left of it: parameters, operations, time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from csgd_cuda import export_pruned
from experiments import data
from experiments.classification.task import Classification, forward_seconds
from experiments.task import DataOptions

_TIMED_BATCH = 128  # images


class Pruning(Classification):
    """As classification, in which the trained model is exported without its dead filters."""

    @classmethod
    def create(cls, options: DataOptions) -> Pruning:
        """On one of data.READERS."""
        return cls(data.load(options), options.augment)

    @torch.no_grad()
    def final(self, model: nn.Module, name: str, seed: int) -> dict[str, Any]:
        """The trained model without dead filters, beside the network as it was built.

        zeros: share of the convolutions' weights that are zero or gone; weights, flops, seconds: parameters of the
        network, operations for one image (two for a product and its sum) and time of a forward pass of _TIMED_BATCH
        images, as it was built; exported, exported_flops, exported_seconds: of the exported model; difference: the
        largest between the logits of the trained and the exported model for test images, relative to the largest logit.
        """
        images, _ = next(iter(self.evaluation_batches("test")))
        inputs = self.cast(self.normalised(images))
        small, logits = export_pruned(model.eval()), model(inputs)
        built = self.build_model(name, seed).to(self.device, self.dtype, memory_format=self.memory_format).eval()
        seconds = forward_seconds([built, small], inputs[:_TIMED_BATCH])
        left = sum(int((p != 0).sum()) for p in _convolutions(model))
        return {
            "zeros": 1 - left / sum(p.numel() for p in _convolutions(built)),
            "weights": sum(p.numel() for p in built.parameters()),
            "flops": _flops(built, inputs[:1]),
            "seconds": seconds[0],
            "exported": sum(p.numel() for p in small.parameters()),
            "exported_flops": _flops(small, inputs[:1]),
            "exported_seconds": seconds[1],
            "difference": float((small(inputs) - logits).abs().max() / logits.abs().max()),
        }


def _convolutions(model: nn.Module) -> list[Tensor]:
    return [p for p in model.parameters() if p.dim() == 4]


def _flops(model: nn.Module, inputs: Tensor) -> int:
    with FlopCounterMode(display=False) as counter:
        model(inputs)
    return counter.get_total_flops()
