# SPDX-License-Identifier: Apache-2.0
"""Batch normalisation in a network whose parameters are bfloat16."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Float32StatisticsBatchNorm(nn.Module):
    """nn.BatchNorm2d with running statistics in float32, whatever the dtype of its parameters and inputs.

    A running mean in bfloat16 would stop moving when a batch changes it by less than 0.2 %, whichever the
    optimizer. Kernels for bfloat16 inputs take float32 statistics only with float32 weight and bias, so these are
    widened on the way in; what is stored, and what the optimizer sees, stays in its own dtype.
    """

    def __init__(self, plain: nn.BatchNorm2d):
        super().__init__()
        self.eps, self.momentum = plain.eps, plain.momentum
        self.weight, self.bias = plain.weight, plain.bias
        self.register_buffer("running_mean", plain.running_mean.float())
        self.register_buffer("running_var", plain.running_var.float())

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W], normalised, in the dtype of ``x``."""
        scale, shift = self.weight.float(), self.bias.float()
        return F.batch_norm(
            x, self.running_mean, self.running_var, scale, shift, self.training, self.momentum, self.eps
        )


def keep_float32_statistics(model: nn.Module) -> nn.Module:
    """The model with each nn.BatchNorm2d in low precision replaced; those of other classes (timm) stay as they are."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.BatchNorm2d and child.affine and child.weight.dtype in (torch.bfloat16, torch.float16):
                setattr(parent, name, Float32StatisticsBatchNorm(child))
    return model
