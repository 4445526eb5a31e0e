# SPDX-License-Identifier: Apache-2.0
"""The direction of torch.optim.AdamW on tensors of opmath.

D. P. Kingma, J. Ba: "Adam: a method for stochastic optimization", ICLR 2015; I. Loshchilov, F. Hutter: "Decoupled
weight decay regularization", ICLR 2019. docs/adamw.md has the formulas.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from .philox import MOMENTUM_STREAM, SECOND_MOMENT_STREAM
from .rule import square_root

_BITS_OF_A_COUNT = 63  # of an int64 >= 0


class AdamWDirection:
    """See ``StepDirection`` in step.py."""

    streams: ClassVar[Mapping[str, int]] = {"exp_avg": MOMENTUM_STREAM, "exp_avg_sq": SECOND_MOMENT_STREAM}

    def __init__(self, options: dict[str, Any], step: Tensor, opmath: torch.dtype) -> None:
        self._options = options
        # In float64, each rounded once to opmath, as the products of a tensor with the numbers 1 - beta are.
        of_mean, of_square = (1.0 - powers(options["betas"], step + 1)).unbind()
        one = torch.ones_like(of_mean)
        self._mean_factor = (one / of_mean).to(opmath)
        self._root_factor = (one / square_root(of_square)).to(opmath)

    def __call__(self, g: Tensor, param: Tensor, buffers: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        (beta1, beta2), options = self._options["betas"], self._options
        mean = buffers["exp_avg"].to(g.dtype) * beta1
        mean += g * (1.0 - beta1)
        square = buffers["exp_avg_sq"].to(g.dtype) * beta2
        square += (g * g).mul_(1.0 - beta2)
        d = (mean * self._mean_factor).div_(square_root(square).mul_(self._root_factor).add_(options["eps"]))
        if options["weight_decay"] != 0:
            d += param.to(g.dtype) * options["weight_decay"]
        return d, {"exp_avg": mean, "exp_avg_sq": square}


def powers(bases: list[float], exponents: Tensor) -> Tensor:
    """Powers by square-and-multiply, of which each product is rounded: the same bits on every device.

    Args:
        bases: numbers.
        exponents: int64 > 0, of shape (parameters, 1).

    Returns:
        float64 of shape (bases, parameters, 1).
    """
    if exponents.device.type == "cpu" and not torch.compiler.is_compiling():
        bits = max(int(exponents.max()), 1).bit_length()
    else:  # to read a count would make the host wait; leading zeros leave the power at 1
        bits = _BITS_OF_A_COUNT

    def number(value: float) -> Tensor:
        return torch.full((), value, dtype=torch.float64, device=exponents.device)

    places = torch.arange(bits - 1, -1, -1, device=exponents.device).view(-1, 1, 1)  # from the highest down
    is_one = (exponents >> places & 1).bool()
    factors = torch.stack([torch.where(is_one, number(base), number(1.0)) for base in bases], dim=1)
    power = torch.ones_like(factors[0])
    for factor in factors.unbind():
        power = power * power * factor
    return power
