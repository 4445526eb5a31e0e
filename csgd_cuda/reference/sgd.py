# SPDX-License-Identifier: Apache-2.0
"""The direction of torch.optim.SGD on tensors of opmath; mirrors ``direction`` in csrc/core/update_rule.h."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from .philox import MOMENTUM_STREAM
from .rule import LAYOUTS


class SgdDirection:
    """See ``StepDirection`` in step.py."""

    streams: ClassVar[Mapping[str, int]] = {"momentum_buffer": MOMENTUM_STREAM}

    def __init__(self, options: dict[str, Any], step: Tensor, opmath: torch.dtype) -> None:
        self._options, self._bits = options, LAYOUTS[opmath].integer

        def number(value: float) -> Tensor:
            return torch.full((), value, dtype=opmath, device=step.device)

        first = (step == 0) | options["fresh_momentum"]
        # On the first step the momentum buffer takes the gradient: -0 takes the place of the buffer, for -0 + g is g.
        self._keeps_buffer = first.to(self._bits) - 1  # all bits, or none
        self._minus_zero = first.to(self._bits) << LAYOUTS[opmath].sign_place
        self._grad_share = torch.where(first, number(1.0), number(1.0 - options["dampening"]))

    def __call__(self, g: Tensor, param: Tensor, buffers: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        options = self._options
        if options["weight_decay"] != 0:
            g = g + param.to(g.dtype) * options["weight_decay"]
        if options["momentum"] == 0:
            return g, {}
        new = buffers["momentum_buffer"].to(g.dtype) * options["momentum"]
        new.view(self._bits).bitwise_and_(self._keeps_buffer).bitwise_or_(self._minus_zero)
        new += g if options["dampening"] == 0 else g * self._grad_share
        d = g + new * options["momentum"] if options["nesterov"] else new
        return d, {"momentum_buffer": new}
