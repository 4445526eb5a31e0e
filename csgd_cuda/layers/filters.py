# SPDX-License-Identifier: Apache-2.0
"""The paper's gradient calibration layer: filters that are products of a few base filters and learned branch factors.

Source: a figure of "GClayer" on the public site of a co-author of Zhuo et al., AAAI 2019. The filters of a convolution
are R_i * w, i = 1 ... K, element by element, with base filters w and branch factors R_i; the forward pass runs through
them. What the figure leaves open (shapes, normalization, initialization) is ours; docs/layer.md says why.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..kinds import FLAG, INTEGER, NUMBER, TEXT
from ..tensors import branch_factors

# What shares factors. Their shape, for base filters of shape (n, inputs, *kernel): see factor_shape().
FACTORS_PER = ("layer", "filter", "channel")


def check_branches(name: str, branches: int, outputs: int) -> None:
    """Raises for a number of branches that does not divide the outputs of the layer called ``name``."""
    INTEGER.check("branches", branches)
    INTEGER.check(f"{name}: the number of outputs", outputs)
    if branches < 1:
        raise ValueError(f"{name}: branches must be at least 1, got {branches}")
    if outputs % branches:
        raise ValueError(
            f"{name}: branches must divide the {outputs} outputs, got {branches}: each base filter makes that many "
            "filters. Take another number of branches or of outputs"
        )


def check_spread(name: str, spread: float) -> None:
    """Raises for a standard deviation of new factors that is none."""
    NUMBER.check("spread", spread)
    if not 0 <= spread < math.inf:
        raise ValueError(f"{name}: spread must be a finite number >= 0, got {spread}")


def factor_shape(base: torch.Size, branches: int, factors_per: str) -> tuple[int, ...]:
    """Of the factors for base filters of shape (n, inputs, *kernel).

    "layer": (branches, 1, *kernel); "filter": (n * branches, 1, *kernel); "channel": (branches, inputs, *kernel).
    """
    count, inputs, *kernel = base
    if factors_per == "channel":
        return (branches, inputs, *kernel)
    return (count * branches if factors_per == "filter" else branches, 1, *kernel)


def centred(factors: Tensor, branch_dim: int = 0) -> Tensor:
    """The factors shifted so that their mean over the branches is 1: then the mean of the branches is the base."""
    return factors - factors.mean(branch_dim, keepdim=True) + 1


class HasFactors(nn.Module):
    """A module whose parameter ``factors`` is marked as branch factors, and so are those of its copies."""

    factors: nn.Parameter

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if (factors := self._parameters.get("factors")) is not None:
            branch_factors(factors)  # a copy of a parameter has lost the mark


class _Branched(HasFactors):
    """What ``GCConv2d`` and ``GCLinear`` share. Comes before the class whose forward pass runs through the filters."""

    weight: nn.Parameter
    branches: int
    normalize: bool
    spread: float

    def _branch(self, branches: int, normalize: bool, factors_per: str, spread: float) -> None:
        """Replaces the weight, which has all filters, by base filters and factors."""
        full = self.weight
        self.branches, self.normalize, self.spread = branches, normalize, spread
        base = full.new_empty((full.shape[0] // branches, *full.shape[1:]))
        self.weight = nn.Parameter(base)
        self.factors = branch_factors(full.new_empty(factor_shape(base.shape, branches, factors_per)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """New base filters as those of the plain layer, factors 1 + spread * normal; then the base filters are made
        smaller, so that the variance of the outputs is that of a new plain layer."""
        if "factors" not in self._parameters:  # called by the constructor of the plain layer
            return
        super().reset_parameters()  # type: ignore[misc]
        nn.init.normal_(self.factors, 1.0, self.spread)
        with torch.no_grad():
            self.weight.div_(self._used_factors().square().mean().sqrt())

    def _used_factors(self) -> Tensor:
        """Of shape (n or 1, branches, inputs or 1, *kernel) for n base filters."""
        factors: Tensor = self.factors.unflatten(0, (-1, self.branches))  # type: ignore[no-untyped-call]
        return centred(factors, 1) if self.normalize else factors

    def filters(self) -> Tensor:
        """The weight of the plain layer that computes the same: filter ``o * branches + i`` is ``R_i * w_o``."""
        return (self.weight.unsqueeze(1) * self._used_factors()).flatten(0, 1)

    def extra_repr(self) -> str:
        """Those of the plain layer, and the branches."""
        plain: str = super().extra_repr()
        return f"{plain}, branches={self.branches}, normalize={self.normalize}"


def _check(name: str, outputs: int, branches: int, normalize: bool, factors_per: str, spread: float) -> None:
    check_branches(name, branches, outputs)
    FLAG.check("normalize", normalize)
    check_spread(name, spread)
    TEXT.check("factors_per", factors_per)
    if factors_per not in FACTORS_PER:
        raise ValueError(f"{name}: factors_per must be one of {', '.join(FACTORS_PER)}, got {factors_per!r}")


class GCConv2d(_Branched, nn.Conv2d):  # type: ignore[misc]
    """nn.Conv2d whose filters are made of fewer base filters: filter ``o * branches + i`` is ``R_i * w_o``.

    The parameters are ``weight``, the base filters w of shape (out_channels / branches, in_channels / groups, kh, kw);
    ``factors``, the R_i; and ``bias``, of all outputs. Backward, w receives the sum over the branches of R_i times the
    gradient of filter R_i * w, and each R_i its own gradient. With four branches a layer has a quarter of the weights
    of nn.Conv2d, and the same cost. ``fold(model)`` makes a plain nn.Conv2d of it.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype: as
            for nn.Conv2d.
        branches: K, how many filters each base filter makes; it divides out_channels.
        normalize: whether the factors are used as R_i - mean(R) + 1. Then the mean of the branches is w: a branch
            that is drawn at random is an unbiased estimate of the variables.
        factors_per: "layer": factors of shape (K, 1, kh, kw); "filter": of their own for each base filter, of shape
            (out_channels, 1, kh, kw); "channel": for each input channel, of shape
            (K, in_channels / groups, kh, kw). With a kernel of 1 x 1 a factor of the first two is one number, and
            the filters of a base filter are multiples of each other: take "channel" there.
        spread: the standard deviation of new factors around 1; 2 was best in trainings (docs/experiments.md).

    Raises:
        ValueError, TypeError: an option is out of range; the message names it.

    Source: see this module's first lines; docs/layer.md has the formulas.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: str | int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros",
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        branches: int = 4,
        normalize: bool = True,
        factors_per: Literal["layer", "filter", "channel"] = "layer",
        spread: float = 2.0,
    ) -> None:
        _check("GCConv2d", out_channels, branches, normalize, factors_per, spread)
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype
        )
        self._branch(branches, normalize, factors_per, spread)

    def forward(self, input: Tensor) -> Tensor:
        """As nn.Conv2d with the weight ``filters()``."""
        out: Tensor = self._conv_forward(input, self.filters(), self.bias)
        return out


class GCLinear(_Branched, nn.Linear):  # type: ignore[misc]
    """nn.Linear made of fewer base rows: row ``o * branches + i`` of the weight is ``R_i * w_o``.

    As ``GCConv2d``, with factors of shape (branches, in_features): a factor that is one number for all inputs would
    make rows that are multiples of each other.

    Args:
        in_features, out_features, bias, device, dtype: as for nn.Linear.
        branches, normalize, spread: as for ``GCConv2d``; ``branches`` divides out_features.

    Raises:
        ValueError, TypeError: an option is out of range; the message names it.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        branches: int = 4,
        normalize: bool = True,
        spread: float = 2.0,
    ) -> None:
        _check("GCLinear", out_features, branches, normalize, "channel", spread)
        super().__init__(in_features, out_features, bias, device, dtype)
        self._branch(branches, normalize, "channel", spread)

    def forward(self, input: Tensor) -> Tensor:
        """As nn.Linear with the weight ``filters()``."""
        return nn.functional.linear(input, self.filters(), self.bias)
