# SPDX-License-Identifier: Apache-2.0
"""CalibratedAdamW, the calibrated torch.optim.AdamW."""

from __future__ import annotations

from typing import Literal

from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack  # of torch's own dependencies

from ..pruning.options import PruningOptions, pruning_defaults
from .base import CalibratedOptimizer
from .direction import ADAMW
from .options import ADAMW_OPTIONS, documented


@documented(ADAMW.options)
class CalibratedAdamW(CalibratedOptimizer):
    """torch.optim.AdamW whose update is a random, unbiased, sparse one.

    A coordinate with AdamW's direction d, decoupled weight decay included, moves with probability
    ``p = min(1, |d| / (c * l))``, rounded up to a multiple of 2^-16, and then by d / p: the mean of the updated
    variable is that of AdamW, exactly, while only a share of the coordinates moves. l bounds ``|d|``: a running maximum
    over the parameter tensor, or a fixed number.

    Args:
        params: parameters, or dicts of parameter groups, as for torch.optim.AdamW. float32, float64, bfloat16,
            float16; every option may differ from group to group. Those without requires_grad may be of any kind as
            long as they have no gradient.
        options: by name, those of the table in csgd_cuda/optim/options.py.

    State per parameter: ``exp_avg`` and ``exp_avg_sq`` (the parameter's shape and dtype), ``step`` (int64, the steps
    applied) and ``lipschitz_bound`` (float32, or float64 for a float64 parameter; not with a fixed constant), the last
    two without dimensions. In bfloat16 and float16 parameters and both means are rounded without bias when they are
    stored, so that no float32 copy of the weights is needed.

    Raises:
        ValueError, TypeError: an option or a parameter is out of range; the message names it.
        RuntimeError: ``fused=True`` cannot be had; the message says why.

    Source: Kingma and Ba, "Adam: a method for stochastic optimization", ICLR 2015; Loshchilov and Hutter, "Decoupled
    weight decay regularization", ICLR 2019; the calibration is that of ``CSGD`` (docs/algorithm.md).
    """

    direction = ADAMW

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float | Tensor = 1e-2,
        amsgrad: bool = False,
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
        options = {name: given[name] for name in ADAMW_OPTIONS}
        super().__init__(params, {**options, **pruning_defaults(pruning, type(self).__name__)})
