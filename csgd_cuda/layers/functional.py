# SPDX-License-Identifier: Apache-2.0
"""The calibration of a gradient as a function: the kernel's operator where there is one, else pure PyTorch."""

from __future__ import annotations

import operator
from typing import Any, Literal

import torch
from torch import Tensor

from .. import extension
from ..kinds import FUSED, INTEGER, OPTIONAL_TENSOR, TENSOR
from ..optim.options import CALIBRATION_OPTIONS, check_options, operator_options, signed_seed
from ..reference.flatten import empty_in_order
from ..reference.philox import GRAD_ROUNDING_STREAM, GRAD_STREAM, draws
from ..reference.rule import (
    LAYOUTS,
    calibrated,
    calibration_scale,
    largest_size,
    moves,
    moving_draws,
    next_bound,
    ordered_bits,
    round_stochastic,
)
from ..tensors import SUPPORTED_DTYPES, opmath_dtype, outside_gpu_code
from .numbered import MOST_RANKS

# Entries of ``tally`` before those of the channels (csrc/core/params.h).
CALIBRATION_TALLY_WORDS = 4
_DRAWN_AT_ONCE = 2**20  # elements: their Philox words take 50 bytes each


@torch.no_grad()
def calibrate_grad(
    grad: Tensor,
    *,
    index: Tensor,
    step: Tensor,
    lipschitz_bound: Tensor | None = None,
    calibration: float = 0.05,
    lipschitz: float | None = None,
    bound_decay: float = 0.99,
    rounding: Literal["stochastic", "nearest"] = "stochastic",
    seed: int = 0,
    channel_dim: int = 0,
    rank: int = 0,
    tally: Tensor | None = None,
    fused: bool | None = None,
) -> Tensor:
    """An unbiased random estimate of ``grad``: g becomes g / p with a probability p, else 0.

    ``p = min(1, |g| / (c * l))``, rounded up to a multiple of 2^-16, so that the mean over the draws is g, exactly.
    ``GradientCalibration`` is a layer made of this.

    Args:
        grad: dense tensor of any shape, float32, float64, bfloat16 or float16. Left as it is.
        index: int64 tensor with one element, different for each gradient, so that their draws differ.
        step: int64 tensor with one element, how many gradients were calibrated so far. Grows by 1.
        lipschitz_bound: float64 tensor, the estimate of the bound l on ``|g|``, zero at the start: of shape () for all
            elements, or of shape (C,) for each channel. Updated: ``max(bound_decay * l, max |g|)``. None where
            ``lipschitz`` is given.
        calibration: c >= 0; 0 gives the gradient as it is.
        lipschitz: a fixed l, in the unit of the gradient.
        bound_decay: beta in [0, 1], how much of the estimate a call keeps.
        rounding: "stochastic" or "nearest", for what is stored in bfloat16 and float16.
        seed: 0 ... 2^64 - 1.
        channel_dim: the dimension of ``grad`` that counts the channels of a ``lipschitz_bound`` of shape (C,).
        rank: 0 ... 2^16 - 1, of the process: each draws its own numbers, for each has a gradient of its own.
        tally: int64 tensor of 4 + C entries (C = 1 with one bound), zero at the start: [0] becomes the number of
            coordinates passed on, [1] the number of all coordinates. The rest is scratch space of a GPU.
        fused: None takes the kernel where there is one, else pure PyTorch; True demands it; False takes the latter.

    Returns:
        A new tensor of the shape, dtype and memory order of ``grad`` (row-major where that is not dense).

    Raises:
        ValueError, TypeError: something is wrong with an argument; the message names it, and nothing was changed.
        RuntimeError: ``fused=True`` cannot be had; the message says why.

    Source: docs/algorithm.md.
    """
    options: dict[str, Any] = {
        "calibration": calibration, "lipschitz": lipschitz, "bound_decay": bound_decay, "rounding": rounding,
        "seed": seed,
    }  # fmt: skip
    check_options(CALIBRATION_OPTIONS, options)
    options = operator_options(CALIBRATION_OPTIONS, options)
    for name, number in (("channel_dim", channel_dim), ("rank", rank)):
        INTEGER.check(name, number)
        options[name] = operator.index(number)
    FUSED.check("fused", fused)
    for name, tensor in (("grad", grad), ("index", index), ("step", step)):
        TENSOR.check(name, tensor)
    for name, given in (("lipschitz_bound", lipschitz_bound), ("tally", tally)):
        OPTIONAL_TENSOR.check(name, given)
    if not extension.takes_kernel(grad.device, fused):
        return _reference_on(grad.device)(grad, index, step, lipschitz_bound, tally, **options)
    # As for a step (optim/direction.py): the same operator, for torch.compile or at less expense.
    if torch.compiler.is_compiling():
        call = torch.ops.csgd_cuda.calibrate_grad
        options["seed"] = signed_seed(options["seed"])
    else:
        call = extension._C.calibrate_grad  # type: ignore[union-attr]
    out: Tensor = call(grad, index, step, lipschitz_bound, tally, **options)
    return out


def _fake(grad: Tensor, *state: Tensor | None, **options: Any) -> Tensor:
    if any(tensor is not None and tensor.device != grad.device for tensor in state):
        raise ValueError(f"calibrate_grad needs all tensors on {grad.device}, the device of the gradient")
    return empty_in_order(grad)


if extension.build_info() is not None:
    torch.library.register_fake("csgd_cuda::calibrate_grad", _fake)


def _check(
    grad: Tensor, index: Tensor, step: Tensor, lipschitz_bound: Tensor | None, tally: Tensor | None, *,
    channel_dim: int, lipschitz: float | None, rank: int, **options: Any,
) -> None:  # fmt: skip
    """What csrc/ops/calibrate_grad.cpp checks beyond the options, for the reference."""
    if not 0 <= rank < MOST_RANKS:
        raise ValueError(f"rank must be in 0 ... {MOST_RANKS - 1}, got {rank}")
    if (lipschitz is None) == (lipschitz_bound is None):
        raise ValueError("lipschitz_bound must be given where lipschitz is not, and only there")
    if not torch.compiler.is_compiling() and grad.layout is not torch.strided:
        raise TypeError(f"the gradient is sparse ({grad.layout}), calibrate_grad needs a dense one")
    if grad.dtype not in SUPPORTED_DTYPES:
        raise TypeError(
            f"the gradient has dtype {grad.dtype}; calibrate_grad supports float32, float64, bfloat16 and float16"
        )
    _check_state(grad.device, index, step, lipschitz_bound, tally)
    channels = 1
    if lipschitz_bound is not None:
        if lipschitz_bound.dim() == 1:
            if not -grad.dim() <= channel_dim < grad.dim():
                raise ValueError(
                    f"channel_dim {channel_dim} is not a dimension of the gradient, which has shape {list(grad.shape)}"
                )
            channels = grad.shape[channel_dim]
        if lipschitz_bound.dim() > 1 or lipschitz_bound.numel() != channels:
            raise ValueError(
                f"lipschitz_bound has shape {list(lipschitz_bound.shape)}, expected {channels} entries, one for each "
                f"channel of the gradient of shape {list(grad.shape)}"
            )
    if tally is not None and tally.numel() != CALIBRATION_TALLY_WORDS + channels:
        raise ValueError(
            f"tally must have {CALIBRATION_TALLY_WORDS + channels} entries, {CALIBRATION_TALLY_WORDS} and one for each "
            f"channel, got {tally.numel()}"
        )


def _check_state(
    device: torch.device, index: Tensor, step: Tensor, lipschitz_bound: Tensor | None, tally: Tensor | None
) -> None:
    for name, tensor, dtype in (
        ("index", index, torch.int64),
        ("step", step, torch.int64),
        ("lipschitz_bound", lipschitz_bound, torch.float64),
        ("tally", tally, torch.int64),
    ):
        if tensor is None:
            continue
        if tensor.dtype != dtype or tensor.device != device or not tensor.is_contiguous():
            raise ValueError(
                f"{name} must be a contiguous {dtype} tensor on {device}, the device of the gradient, got "
                f"{tensor.dtype} on {tensor.device}"
            )
        if tensor.is_inference() and not torch.is_inference_mode_enabled():
            raise ValueError(f"{name} is an inference tensor, which can be changed inside torch.inference_mode() only")
    if index.numel() != 1 or step.numel() != 1:
        raise ValueError(f"index and step must have one element each, got {index.numel()} and {step.numel()}")


def _all_draws(numel: int, *, stream: int, seed: int, index: Tensor, step: Tensor) -> Tensor:
    """The draws of all elements, made a part at a time: uint16 of shape (numel,)."""
    out = torch.empty(numel, dtype=torch.uint16, device=step.device)
    for begin in range(0, numel, _DRAWN_AT_ONCE):
        end = min(begin + _DRAWN_AT_ONCE, numel)
        out[begin:end] = draws(begin, end, seed=seed, stream=stream, index=index, step=step, device=step.device)
    return out


def _reference(
    grad: Tensor, index: Tensor, step: Tensor, lipschitz_bound: Tensor | None, tally: Tensor | None, *, seed: int,
    **options: Any,
) -> Tensor:  # fmt: skip
    """calibrate_grad in pure PyTorch: the bits of the kernels."""
    _check(grad, index, step, lipschitz_bound, tally, **options)
    out = empty_in_order(grad)
    opmath = opmath_dtype(grad.dtype)
    layer = (index.reshape(()) + (options["rank"] << 16)) & 0xFFFFFFFF

    def draws_of(stream: int) -> Tensor:  # in the memory order of the gradient
        flat = _all_draws(grad.numel(), stream=stream, seed=seed, index=layer, step=step.reshape(()))
        return flat.as_strided(out.shape, out.stride())

    per_channel = lipschitz_bound is not None and lipschitz_bound.dim() == 1
    # Where a channel has a bound of its own, bounds lie along its dimension.
    shape = [1] * grad.dim()
    if per_channel:
        shape[options["channel_dim"]] = -1
    if lipschitz_bound is None:
        bound = torch.full((), options["lipschitz"], dtype=opmath, device=grad.device)
    else:
        bound = lipschitz_bound.to(opmath).reshape(shape if per_channel else ())
    d = grad.to(opmath)
    size = d.abs()
    n = moving_draws(size, calibration_scale(options["calibration"], bound))
    move = moves(draws_of(GRAD_STREAM), n)
    values = calibrated(d, n)
    values.view(LAYOUTS[opmath].integer).bitwise_and_(move)
    if options["rounding"] == "stochastic" and opmath != grad.dtype:
        values = round_stochastic(values, grad.dtype, draws_of(GRAD_ROUNDING_STREAM))
    out.copy_(values)
    if lipschitz_bound is not None:
        largest = _largest(size, [k for k in range(grad.dim()) if not (per_channel and shape[k] == -1)])
        lipschitz_bound.copy_(next_bound(bound, options["bound_decay"], largest).reshape(lipschitz_bound.shape))
    step += 1
    if tally is not None:
        tally[0], tally[1] = -move.sum(), grad.numel()
    return out


_reference_on = outside_gpu_code(_reference)


def _largest(size: Tensor, dims: list[int]) -> Tensor:
    """The largest finite magnitude along the dimensions, which stay with size 1; 0 where there is none."""
    ordered = ordered_bits(size)
    if dims and size.numel():
        ordered = ordered.amax(dims, keepdim=True)
    elif dims:
        ordered = ordered.new_zeros([1 if k in dims else n for k, n in enumerate(size.shape)])
    return largest_size(ordered, size.dtype)
