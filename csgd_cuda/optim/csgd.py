# SPDX-License-Identifier: Apache-2.0
"""CSGD, the calibrated torch.optim.SGD."""

from __future__ import annotations

from typing import Literal

from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack  # of torch's own dependencies

from ..pruning.options import PruningOptions, pruning_defaults
from .base import CalibratedOptimizer
from .direction import SGD
from .options import SGD_OPTIONS, documented


@documented(SGD.options)
class CSGD(CalibratedOptimizer):
    """Calibrated Stochastic Gradient Descent: torch.optim.SGD whose update is a random, unbiased, sparse one.

    A coordinate with SGD direction d moves with probability ``p = min(1, |d| / (c * l))``, rounded up to a multiple
    of 2^-16, and then by d / p: the mean of the updated variable is that of SGD, exactly, while only a share of
    the coordinates moves. l bounds ``|d|``: a running maximum over the parameter tensor, or a fixed number.

    Args:
        params: parameters, or dicts of parameter groups, as for torch.optim.SGD. float32, float64, bfloat16,
            float16; every option may differ from group to group. Those without requires_grad may be of any kind as
            long as they have no gradient.
        options: by name, those of the table in csgd_cuda/optim/options.py.

    State per parameter: ``momentum_buffer`` (with momentum; the parameter's shape and dtype), ``step`` (int64, the
    steps applied) and ``lipschitz_bound`` (float32, or float64 for a float64 parameter; not with a fixed constant),
    both without dimensions.

    Raises:
        ValueError, TypeError: an option or a parameter is out of range; the message names it.
        RuntimeError: ``fused=True`` cannot be had; the message says why.

    Source: Zhuo et al., "Calibrated Stochastic Gradient Descent for Convolutional Neural Networks", AAAI 2019; the
    formulation is ours (docs/algorithm.md).
    """

    direction = SGD

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float | Tensor = 0,
        nesterov: bool = False,
        *,
        calibration: float = 0.25,
        lipschitz: float | None = None,
        bound_decay: float = 0.99,
        rounding: Literal["stochastic", "nearest"] = "stochastic",
        seed: int = 0,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        capturable: bool = False,
        first_index: int | None = None,
        **pruning: Unpack[PruningOptions],
    ) -> None:
        given = locals()
        options = {name: given[name] for name in SGD_OPTIONS}
        super().__init__(params, {**options, **pruning_defaults(pruning, type(self).__name__)})
