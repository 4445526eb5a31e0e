# SPDX-License-Identifier: Apache-2.0
"""How much of the parameter vector lies in the features of a network that never got it as an input."""

from __future__ import annotations

import torch
from torch import Tensor


class LinearProbe:
    """The linear function of the features [N, F] that comes closest to the parameter vectors [N, P], least squares.

    Computed on the CPU in float64.
    """

    def __init__(self, features: Tensor, vectors: Tensor):
        inputs = _with_one(features)
        # gelsd also takes features that depend on each other or never vary, as those of dead units.
        self.weights = torch.linalg.lstsq(inputs, vectors.double().cpu(), driver="gelsd").solution

    def __call__(self, features: Tensor) -> Tensor:
        """Vectors [B, P] of features [B, F], between 0 and 1, on the device and in the dtype of the features."""
        return (_with_one(features) @ self.weights).clamp(0, 1).to(features)


def _with_one(features: Tensor) -> Tensor:
    features = features.double().cpu()
    return torch.cat([features, torch.ones(len(features), 1, dtype=torch.float64)], dim=1)
