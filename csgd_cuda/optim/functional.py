# SPDX-License-Identifier: Apache-2.0
"""The steps of the calibrated optimizers as functions of lists of tensors."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor

from .. import extension
from ..kinds import FUSED, OPTIONAL_TENSOR, integer_list, tensor_list
from ..tensors import StepTensors
from .direction import ADAMW, SGD, Direction
from .options import ADAMW_OPTIONS, SGD_OPTIONS, check_options, documented, options_of_step, step_options


@documented(options_of_step(SGD_OPTIONS))
@torch.no_grad()
def csgd_(
    params: Iterable[Tensor],
    grads: Iterable[Tensor],
    momentum_buffers: Iterable[Tensor],
    steps: Iterable[Tensor],
    lipschitz_bounds: Iterable[Tensor],
    *,
    lr: float | Tensor,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    calibration: float = 0.25,
    lipschitz: float | None = None,
    bound_decay: float = 0.99,
    rounding: Literal["stochastic", "nearest"] = "stochastic",
    seed: int = 0,
    maximize: bool = False,
    indices: Iterable[int] | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    fused: bool | None = None,
) -> None:
    """One step of Calibrated SGD on lists of tensors of one device, in place: that of ``CSGD``, without its state.

    Args:
        params: dense tensors of any shape, float32, float64, bfloat16 or float16; dtypes may be mixed. Updated.
        grads: the gradients, one for each parameter, of its shape and dtype. Left as they are.
        momentum_buffers: tensors of the parameters' shapes and dtypes, zero at the start; empty when momentum
            is 0. Updated.
        steps: int64 tensors with one element, the steps applied so far. Each grows by 1.
        lipschitz_bounds: tensors with one element, float64 for a float64 parameter, else float32: the estimate
            of the Lipschitz bound, zero at the start; empty when ``lipschitz`` is given. Updated.
        options: by name, those of the table in csgd_cuda/optim/options.py.
        indices: for each parameter a number of its own, so that their random draws differ; None: its place in the list.
        grad_scale: float32 tensor with one element: the gradients are this many times too large.
        found_inf: float32 tensor with one element: where it is not 0, nothing at all is changed.
        fused: None takes the kernel where there is one, else the reference; True demands the kernel; False takes
            the reference.

    Raises:
        ValueError, TypeError: something is wrong with an argument; the message names it, and nothing was changed.
        RuntimeError: ``fused=True`` cannot be had; the message says why.

    Source: docs/algorithm.md, which derives the rule.
    """
    options = {
        "lr": lr, "momentum": momentum, "dampening": dampening, "weight_decay": weight_decay, "nesterov": nesterov,
        "calibration": calibration, "lipschitz": lipschitz, "bound_decay": bound_decay, "rounding": rounding,
        "seed": seed, "maximize": maximize,
    }  # fmt: skip
    buffers = {"momentum_buffer": tensor_list("momentum_buffers", momentum_buffers)}
    _step(SGD, params, grads, buffers, steps, lipschitz_bounds, options, indices, grad_scale, found_inf, fused)


@documented(options_of_step(ADAMW_OPTIONS))
@torch.no_grad()
def calibrated_adamw_(
    params: Iterable[Tensor],
    grads: Iterable[Tensor],
    exp_avgs: Iterable[Tensor],
    exp_avg_sqs: Iterable[Tensor],
    steps: Iterable[Tensor],
    lipschitz_bounds: Iterable[Tensor],
    *,
    lr: float | Tensor,
    betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    calibration: float = 0.25,
    lipschitz: float | None = None,
    bound_decay: float = 0.99,
    rounding: Literal["stochastic", "nearest"] = "stochastic",
    seed: int = 0,
    maximize: bool = False,
    indices: Iterable[int] | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    fused: bool | None = None,
) -> None:
    """One step of calibrated AdamW on lists of tensors of one device, in place: that of ``CalibratedAdamW``, without
    its state.

    Args:
        params: dense tensors of any shape, float32, float64, bfloat16 or float16; dtypes may be mixed. Updated.
        grads: the gradients, one for each parameter, of its shape and dtype. Left as they are.
        exp_avgs: the means of the gradients, tensors of the parameters' shapes and dtypes, zero at the start. Updated.
        exp_avg_sqs: the means of the gradients' squares, likewise. Updated.
        steps: int64 tensors with one element, the steps applied so far. Each grows by 1.
        lipschitz_bounds: tensors with one element, float64 for a float64 parameter, else float32: the estimate
            of the bound on the direction, zero at the start; empty when ``lipschitz`` is given. Updated.
        options: by name, those of the table in csgd_cuda/optim/options.py.
        indices: for each parameter a number of its own, so that their random draws differ; None: its place in the list.
        grad_scale: float32 tensor with one element: the gradients are this many times too large.
        found_inf: float32 tensor with one element: where it is not 0, nothing at all is changed.
        fused: None takes the kernel where there is one, else the reference; True demands the kernel; False takes
            the reference.

    Raises:
        ValueError, TypeError: something is wrong with an argument; the message names it, and nothing was changed.
        RuntimeError: ``fused=True`` cannot be had; the message says why.

    Source: Kingma and Ba, "Adam", ICLR 2015; Loshchilov and Hutter, "Decoupled weight decay regularization", ICLR 2019;
    docs/adamw.md derives the rule.
    """
    options = {
        "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "calibration": calibration,
        "lipschitz": lipschitz, "bound_decay": bound_decay, "rounding": rounding, "seed": seed, "maximize": maximize,
    }  # fmt: skip
    buffers = {
        "exp_avg": tensor_list("exp_avgs", exp_avgs), "exp_avg_sq": tensor_list("exp_avg_sqs", exp_avg_sqs)
    }  # fmt: skip
    _step(ADAMW, params, grads, buffers, steps, lipschitz_bounds, options, indices, grad_scale, found_inf, fused)


def _step(
    direction: Direction, params: Iterable[Tensor], grads: Iterable[Tensor], buffers: dict[str, list[Tensor]],
    steps: Iterable[Tensor], lipschitz_bounds: Iterable[Tensor], options: dict[str, Any],
    indices: Iterable[int] | None, grad_scale: Tensor | None, found_inf: Tensor | None, fused: bool | None,
) -> None:  # fmt: skip
    """The step of a direction with arguments that a user gave."""
    table = options_of_step(direction.options)
    check_options(table, options)
    FUSED.check("fused", fused)
    OPTIONAL_TENSOR.check("grad_scale", grad_scale)
    OPTIONAL_TENSOR.check("found_inf", found_inf)
    tensors = StepTensors(
        tensor_list("params", params), tensor_list("grads", grads), buffers, tensor_list("steps", steps),
        tensor_list("lipschitz_bounds", lipschitz_bounds),
        [] if indices is None else integer_list("indices", indices), [],
    )  # fmt: skip
    if not tensors.params:
        return
    if indices is None:
        tensors.indices.extend(range(len(tensors.params)))
    device = tensors.params[0].device
    of_call = {"grad_scale": grad_scale, "found_inf": found_inf, "tallies": None, **direction.fresh_argument(False)}
    kernel = extension.takes_kernel(device, fused)
    direction.step(tensors, step_options(table, options, device) | of_call, kernel=kernel)
